"""Tiny random models for the tests: every parameter differs from its usual start."""

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import Griffin, GriffinConfig, Runtime
from recurrentgemma.checkpoints.parameters import describe, named_parameters

WINDOW = 6
NOISE = 0.2
A_PARAM_RANGE = (-9.0, -4.3)
"""Of the decays that a new model begins with."""


def tiny_config(**fields) -> GriffinConfig:
    """A small R R A model; any field can be replaced."""
    defaults = {
        "vocab_size": 40,
        "width": 24,
        "mlp_width": 32,
        "num_layers": 3,
        "num_heads": 3,
        "head_dim": 8,
        "attention_window": WINDOW,
        "lru_width": 32,
        "num_gate_blocks": 4,
        "embedding_scale": 5.0,
        "logits_soft_cap": 30.0,
    }
    return GriffinConfig(**{**defaults, **fields})


def random_model(
    config: GriffinConfig, *, runtime: Runtime = Runtime(), seed: int = 0
) -> Griffin:
    """A float32 model whose biases, norms and decays are random too.

    Drawn by NumPy, because nothing is compiled then.
    """
    described = describe(config, runtime)
    rng = np.random.default_rng(seed)
    leaves = [
        jnp.asarray(_draw(rng, name, leaf.shape), jnp.float32)
        for name, leaf in named_parameters(described).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(described), leaves)


def _draw(rng, name, shape):
    """About the model's own start, and noise."""
    spread = NOISE
    if name.endswith("embedding"):
        spread += shape[-1] ** -0.5
    elif name.endswith("kernel") and "conv_1d" not in name:
        spread += shape[-2] ** -0.5
    values = spread * rng.standard_normal(shape)
    if name.endswith("a_param"):
        values += rng.uniform(*A_PARAM_RANGE, shape)
    return values


@jax.jit
def forward(model, tokens, positions=None, cache=None):
    """Logits and cache of a call."""
    hidden, cache = model(tokens, positions, cache)
    return model.logits(hidden), cache


def random_tokens(shape, *, seed: int = 0, vocab_size: int = 40) -> jax.Array:
    """Uniform tokens."""
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size, jnp.int32)
