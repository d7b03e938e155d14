"""Models and comparisons that the checkpoint tests share."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.checkpoints import FORMATS, named_parameters
from tests.models import random_model, tiny_config

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
    """A random model in one dtype."""
    made = random_model(config(**fields), seed=seed)
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), made)


def assert_same_parameters(actual, expected) -> None:
    """Equal names, dtypes and bits."""
    actual, expected = named_parameters(actual), named_parameters(expected)
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        bits = [np.asarray(a).tobytes() for a in (actual[name], array)]
        assert bits[0] == bits[1], name


def assert_same_files(layout, actual, expected) -> None:
    """Equal bytes; Orbax's store has random names, so there equal tensors."""
    if layout == "official_flax":
        pairs = [FORMATS[layout].read(path).tensors for path in (actual, expected)]
        assert list(pairs[0]) == list(pairs[1])
        for name in pairs[0]:
            arrays = [tensors[name].load() for tensors in pairs]
            assert arrays[0].dtype == arrays[1].dtype, name
            assert arrays[0].tobytes() == arrays[1].tobytes(), name
        return
    names = [{file.name for file in path.iterdir()} for path in (actual, expected)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (actual / name).read_bytes() == (expected / name).read_bytes(), name


def fields_for(layout, fields):
    """Without the fields in which official models are fixed."""
    if not layout.startswith("official"):
        return fields
    fixed = {"num_kv_heads", "conv_width"}
    return {name: value for name, value in fields.items() if name not in fixed}


needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)
every_format = pytest.mark.parametrize("layout", FORMATS)
safetensors_formats = pytest.mark.parametrize("layout", ["native", "hugging_face"])
