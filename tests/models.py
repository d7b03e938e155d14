"""Tiny random models for the tests: every parameter differs from its usual start."""

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma import Griffin, GriffinConfig, Runtime

WINDOW = 6


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
    """A model whose biases, norms and decays are random too."""
    model = Griffin(config, rngs=nnx.Rngs(seed), runtime=runtime)
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


@jax.jit
def forward(model, tokens, positions=None, cache=None):
    """Logits and cache of a call."""
    hidden, cache = model(tokens, positions, cache)
    return model.logits(hidden), cache


def random_tokens(shape, *, seed: int = 0, vocab_size: int = 40) -> jax.Array:
    """Uniform tokens."""
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size, jnp.int32)
