"""Tiny random models for the tests: every parameter differs from its usual start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recurrentgemma import PRESETS, Griffin, GriffinConfig, Runtime
from recurrentgemma.adapters import add_adapters
from recurrentgemma.checkpoints.parameters import (
    describe,
    named_parameters,
    parameter_values,
    with_values,
)
from recurrentgemma.matrices import LowRank

WINDOW = 6
SIZES = {
    "vocab_size": 40,
    "width": 24,
    "mlp_width": 32,
    "num_heads": 4,
    "head_dim": 8,
    "attention_window": WINDOW,
    "lru_width": 32,
    "num_gate_blocks": 4,
}
"""Sizes of a tiny model."""
NOISE = 0.2
EVERY_MATRIX = ("*.kernel", "embedder.embedding")
"""Patterns of linear layers, the gates of the RG-LRU, and the embedding."""
A_PARAM_RANGE = (-9.0, -4.3)
"""Of the decays that a new model begins with."""


def tiny_config(**fields) -> GriffinConfig:
    """A small R R A model; any field can be replaced."""
    defaults = {
        **SIZES,
        "num_layers": 3,
        "num_heads": 3,
        "embedding_scale": 5.0,
        "logits_soft_cap": 30.0,
    }
    return GriffinConfig(**{**defaults, **fields})


def tiny_preset(name: str) -> GriffinConfig:
    """A preset in small: one round of its pattern, and its own kinds of heads, biases,
    norms and scales."""
    preset = PRESETS[name]
    kv_heads = {1: 1, preset.num_heads: 4}.get(preset.num_kv_heads, 2)
    scale = preset.embedding_scale / preset.width**0.5
    return dataclasses.replace(
        preset,
        **SIZES,
        num_layers=len(preset.block_pattern),
        num_kv_heads=kv_heads,
        query_scale=None if preset.query_scale is None else 0.3,
        embedding_scale=1.0 if preset.embedding_scale == 1 else scale * 24**0.5,
    )


def structure(config: GriffinConfig) -> GriffinConfig:
    """The architecture without the factors of embeddings, queries and logits."""
    return dataclasses.replace(
        config, embedding_scale=1.0, query_scale=None, logits_soft_cap=None
    )


TINY_PRESETS = {
    name: tiny_preset(name)
    for name in (
        *("nano", "hawk-100m", "nano-transformer"),
        *("gemma-2b", "gemma-7b", "gemma2-27b"),
    )
}
"""One preset of each structure."""


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


def adapt(model, patterns=EVERY_MATRIX, *, seed=1, **settings):
    """The model with adapters that change what it computes: B is random too."""
    settings = {"rank": 2, "alpha": 3.0, **settings}
    adapted = add_adapters(model, patterns, rngs=nnx.Rngs(seed), **settings)
    rng = np.random.default_rng(seed)
    values = parameter_values(adapted)
    for name, value in values.items():
        if not isinstance(value, LowRank):
            continue
        noise = 0.2 * rng.standard_normal(value.lora_b.shape)
        values[name] = dataclasses.replace(value, lora_b=jnp.float32(noise))
    return with_values(adapted, values)


@jax.jit
def forward(model, tokens, positions=None, cache=None):
    """Logits and cache of a call."""
    hidden, cache = model(tokens, positions, cache)
    return model.logits(hidden), cache


def random_tokens(shape, *, seed: int = 0, vocab_size: int = 40) -> jax.Array:
    """Uniform tokens."""
    return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size, jnp.int32)
