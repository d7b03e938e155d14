"""Models and comparisons that the checkpoint tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recurrentgemma import Griffin
from recurrentgemma.checkpoints import FORMATS, named_parameters
from tests.models import tiny_config

BYTES_AT_ONCE = 4096
"""Slices this small make every tensor of a tiny model take several."""


def config(**fields):
    """A tiny architecture that every format can hold."""
    defaults = {
        "lru_width": 36,
        "num_gate_blocks": 3,
        "embedding_scale": float(jnp.bfloat16(24**0.5)),
    }
    return tiny_config(**{**defaults, **fields})


@functools.cache
def model(*, dtype="float32", seed: int = 0, **fields):
    """A random model; drawn by NumPy, because nothing is compiled then."""
    made = config(**fields)
    described = nnx.eval_shape(lambda: Griffin(made, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype), described
    )


def assert_same_parameters(actual, expected) -> None:
    """Equal names, dtypes and bits."""
    actual, expected = named_parameters(actual), named_parameters(expected)
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        bits = [np.asarray(a).tobytes() for a in (actual[name], array)]
        assert bits[0] == bits[1], name


FORMAT_NAMES = list(FORMATS)
