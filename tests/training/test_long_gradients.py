"""Gradients chunk by chunk are those of plain backpropagation, leaf by leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.cache import Cache, named_leaves
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.kernels.local_attention import KVCache
from recurrentgemma.training.chunks import in_chunks
from recurrentgemma.training.data import Batch
from recurrentgemma.training.long_gradients import long_gradients
from recurrentgemma.training.state import with_parameters
from recurrentgemma.training.step import batch_sums
from tests.models import forward, random_model, random_tokens, tiny_config
from tests.tolerances import assert_close

CHUNK = 5
LENGTH = 23
READ = 9
"""Tokens that the rows have read before."""


def packed_batch():
    """Two rows that go on, with document starts and padding inside chunks and at their
    borders."""
    going_on = np.arange(READ, READ + 60)
    first = [*going_on[:7], -1, -1, *range(6), *range(4), -1, *range(2), -1]
    second = [-1, *going_on[:13], *range(9)]
    positions = np.array([first, second], np.int32)
    assert positions.shape == (2, LENGTH)
    tokens = np.asarray(random_tokens((2, LENGTH + 1), seed=3))
    mask = (positions >= 0) & (np.roll(positions, -1, axis=1) > 0)
    return Batch(tokens[:, :-1], positions, tokens[:, 1:], mask.astype(np.float32))


def after_reading(config):
    """A model, and a cache of two rows that have read something."""
    model = random_model(config)
    empty = model.init_cache(2, capacity=READ + LENGTH)
    return model, forward(model, random_tokens((2, READ), seed=8), None, empty)[1]


def visible(cache):
    """Values that a later token can see: slots of rings that are empty hold anything."""

    def hide(state):
        if not isinstance(state, KVCache):
            return state
        is_held = (state.positions >= 0)[..., None, None]
        keys, values = (jnp.where(is_held, x, 0) for x in state[:2])
        return state._replace(keys=keys, values=values)

    return Cache(tuple(map(hide, cache.layers)), cache.next_position)


@functools.partial(jax.jit, static_argnums=0)
def gradients_of(read, model, batch, cache, weight):
    """Of the sum of the loss and, with a weight, of all that the cache holds at the end:
    to the parameters, and to the cache at the beginning."""

    def value(params, values):
        start = cache.with_floating(values)
        sums, after = read(with_parameters(model, params), batch, start)
        ends = [jnp.sum(jnp.sin(x)) for x in visible(after).floating().values()]
        return sums["loss"] + weight * sum(ends), sums

    params, values = named_parameters(model), cache.floating()
    return jax.grad(value, argnums=(0, 1), has_aux=True)(params, values)


def assert_equal_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0, f"nothing depends on {name}"
        assert_close(actual[name], gradient, "long_gradient")


PATTERNS = {
    "griffin": ("recurrent", "local_attention"),
    **{kind: (kind,) for kind in TEMPORAL_MIXERS},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_chunks_change_no_gradient(name):
    """Also those through the last cache, to the parameters and to the first cache."""
    pattern = PATTERNS[name]
    layers = max(2, len(pattern))
    config = tiny_config(block_pattern=pattern, num_layers=layers, mlp_width=0)
    model, cache = after_reading(config)
    batch = packed_batch()
    (d_params, d_cache), sums = gradients_of(batch_sums, model, batch, cache, 1.0)
    read = in_chunks(batch_sums, CHUNK, keep_every=2)
    (ours, our_cache), our_sums = gradients_of(read, model, batch, cache, 1.0)
    np.testing.assert_allclose(our_sums["loss"], sums["loss"], rtol=1e-6)
    assert our_sums["tokens"] == sums["tokens"] == batch.mask.sum()
    assert_equal_gradients(ours, d_params)
    assert_equal_gradients(our_cache, d_cache)

    (d_params, d_cache), _ = gradients_of(batch_sums, model, batch, cache, 0.0)
    d_params = {name: x for name, x in d_params.items() if "norm" not in name}
    sizes = {"chunk_tokens": CHUNK, "keep_every": 3, "offload": True}
    found = long_gradients(model, batch, cache, **sizes, names=d_params)
    np.testing.assert_allclose(found.sums["loss"], sums["loss"], rtol=1e-6)
    assert_equal_gradients(found.parameters, d_params)
    assert_equal_gradients(found.initial_cache, d_cache)
    _, after = jax.jit(batch_sums)(model, batch, cache)
    ends = named_leaves(visible(found.cache))
    for leaf_name, leaf in named_leaves(visible(after)).items():
        assert_close(ends[leaf_name], leaf, "cache")


def test_what_cannot_be_read_is_refused():
    model = random_model(tiny_config(block_pattern=("min_gru",), num_layers=1))
    batch = packed_batch()
    for fields, message in (
        ({"chunk_tokens": 0}, "chunk_tokens: expected an integer of at least 1"),
        ({"keep_every": 0}, "keep_every: expected an integer of at least 1"),
        ({"names": ["a.b"]}, "names: expected native names of parameters, got 'a.b'"),
    ):
        with pytest.raises(ValueError, match=message):
            long_gradients(model, batch, **fields)
    with pytest.raises(ValueError, match="chunk_tokens: expected"):
        in_chunks(batch_sums, 0)


@pytest.mark.parametrize("keep_every", [1, 2])
def test_sums_may_be_arrays(keep_every):
    """They are added up over chunks alone."""
    model = random_model(tiny_config(block_pattern=("min_gru",), num_layers=1))
    batch = packed_batch()

    def by_row(model, batch, cache):
        return {"counted": batch.mask.sum(axis=1)}, cache

    read = in_chunks(by_row, CHUNK, keep_every)
    sums, _ = read(model, batch, model.init_cache(2))
    np.testing.assert_array_equal(sums["counted"], batch.mask.sum(axis=1))
