"""Row operations on caches, and the check of positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import Runtime
from recurrentgemma import cache as cache_lib
from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.blocks.mixer import Mixer
from recurrentgemma.chunk import check_positions
from recurrentgemma.kernels.local_attention import KVCache
from tests.models import (
    TINY_PRESETS,
    forward,
    random_model,
    random_tokens,
    tiny_config,
)
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(num_layers=3))


@pytest.fixture(scope="module")
def cache(model):
    tokens = random_tokens((3, 8))
    positions = np.array([[*range(8)], [*range(5), -1, -1, -1], [-1] * 8])
    return forward(model, tokens, positions)[1]


def _rows(cache, row):
    return [np.asarray(leaf)[row] for leaf in jax.tree.leaves(cache)]


def test_take_repeat_concatenate(cache):
    taken = cache_lib.take(cache, [2, 0, 0])
    repeated = cache_lib.repeat(cache, 2)
    joined = cache_lib.concatenate([taken, cache])
    assert (taken.batch_size, repeated.batch_size, joined.batch_size) == (3, 6, 6)
    for actual, row, source in (
        (taken, 0, 2),
        (taken, 2, 0),
        (repeated, 1, 0),
        (repeated, 2, 1),
        (joined, 0, 2),
        (joined, 4, 1),
    ):
        for ours, theirs in zip(_rows(actual, row), _rows(cache, source), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_bad_rows(cache, model):
    with pytest.raises(ValueError, match="from 0 to 2"):
        cache_lib.take(cache, [3])
    for rows in ([True, False, True], [0.0], [], [[0]], np.array([True])):
        with pytest.raises(
            ValueError, match="rows: expected a list of at least one in"
        ):
            cache_lib.take(cache, rows)
    with pytest.raises(ValueError, match="count: expected an integer of at least 1"):
        cache_lib.repeat(cache, 0)
    with pytest.raises(ValueError, match="caches: expected a list of at least one"):
        cache_lib.concatenate([])
    other = random_model(tiny_config(attention_window=5)).init_cache(1)
    with pytest.raises(ValueError, match=r"caches\[1\]: expected one that fits"):
        cache_lib.concatenate([cache, other])


CONFIGS = {
    "recurrent-recurrent-local_attention": tiny_config(),
    "gemma2": TINY_PRESETS["gemma2-27b"],
    "gemma2-wide": dataclasses.replace(
        TINY_PRESETS["gemma2-27b"], attention_window=100
    ),
    **{
        kind: tiny_config(block_pattern=(kind,))
        for kind, mixer in TEMPORAL_MIXERS.items()
        if mixer.make_rewindable.__func__ is not Mixer.make_rewindable.__func__
    },
}
"""Of every mixer that tokens can be taken back from."""


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rewinding_is_as_if_the_tokens_had_not_come(name, dtype):
    """Read, take back, read on: logits and cache, from rows of every length."""
    config, most = CONFIGS[name], 4
    model = random_model(config, runtime=Runtime(compute_dtype=dtype))
    tokens = random_tokens((5, 60))
    lengths = np.array([0, 1, 5, 7, 40])
    steps = np.arange(40)[None]
    start = np.where(steps < lengths[:, None], steps, -1)
    empty = model.init_cache(5, capacity=80)
    plain = forward(model, tokens[:, :40], start, empty)[1]
    cache = cache_lib.make_rewindable(plain, config, most)
    for round_, counts in enumerate(([0, 4, 1, 2, 3], [4, 4, 4, 0, 1], [0] * 5)):
        counts = np.array(counts)
        chunk = random_tokens((5, 5), seed=round_)
        steps = np.arange(5)[None]
        positions = np.asarray(plain.next_position)[:, None] + steps
        logits, cache = forward(model, chunk, positions, cache)
        cache = cache_lib.rewind(cache, config, counts)
        kept = np.where(steps < 5 - counts[:, None], positions, -1)
        expected, plain = forward(model, chunk, kept, plain)
        is_kept = (kept >= 0)[..., None]
        assert_close(
            np.where(is_kept, logits, 0),
            np.where(is_kept, expected, 0),
            "logits",
            dtype,
        )
    again = cache_lib.make_rewindable(cache, config, 0)
    assert jax.tree.structure(again) == jax.tree.structure(plain)
    np.testing.assert_array_equal(again.next_position, plain.next_position)
    for ours, theirs in zip(again.layers, plain.layers, strict=True):
        if isinstance(ours, KVCache):
            np.testing.assert_array_equal(ours.positions, theirs.positions)
    logits, _ = forward(model, tokens[:, 40:], None, again)
    expected, _ = forward(model, tokens[:, 40:], None, plain)
    assert_close(logits, expected, "logits", dtype)


@pytest.mark.parametrize("spare", [0, 4])
def test_local_rings_grow_with_the_capacity_up_to_the_window(spare):
    """From fewer slots than the window to all of them, and to those of `rewind`."""
    window, most = 20, 64
    config = dataclasses.replace(
        TINY_PRESETS["gemma2-27b"], attention_window=window, vocab_size=8
    )
    model = random_model(config)
    tokens = random_tokens((2, 60), vocab_size=8)
    large = cache_lib.make_rewindable(model.init_cache(2, capacity=most), config, spare)
    cache = cache_lib.make_rewindable(model.init_cache(2, capacity=8), config, spare)
    for capacity, start, stop in ((8, 0, 8), (16, 8, 16), (most, 16, 60)):
        cache = cache_lib.grow(cache, config, capacity)
        slots = [layer.positions.shape[1] for layer in cache.layers]
        assert slots == [min(window, capacity) + spare, capacity]
        logits, cache = forward(model, tokens[:, start:stop], cache=cache)
        expected, large = forward(model, tokens[:, start:stop], cache=large)
        assert_close(logits, expected, "logits")
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, large)
    counts = np.array([spare, 0])
    cache, large = (cache_lib.rewind(c, config, counts) for c in (cache, large))
    np.testing.assert_array_equal(cache.layers[0].positions, large.layers[0].positions)
    assert_close(
        forward(model, tokens[:, :16], cache=cache_lib.grow(cache, config, 128))[0],
        forward(model, tokens[:, :16], cache=cache_lib.grow(large, config, 128))[0],
        "logits",
    )


def test_without_a_capacity_the_cache_grows_as_the_text_does():
    """A call without a cache, then calls outside jit."""
    config = CONFIGS["gemma2-wide"]
    model = random_model(config)
    tokens = random_tokens((2, 150))
    _, cache = model(tokens[:, :5])
    assert [layer.positions.shape[1] for layer in cache.layers] == [5, 5]
    middle, cache = model(tokens[:, 5:21], cache=cache)
    assert [layer.positions.shape[1] for layer in cache.layers] == [32, 32]
    rest, cache = model(tokens[:, 21:], cache=cache)
    assert [layer.positions.shape[1] for layer in cache.layers] == [100, 256]
    whole, _ = model(tokens)
    joined = jnp.concatenate([middle, rest], axis=1)
    assert_close(model.logits(joined), model.logits(whole[:, 5:]), "logits")


@pytest.mark.parametrize("pattern", [("recurrent", "local_attention"), ("min_gru",)])
def test_no_other_model_uses_the_capacity(pattern):
    model = random_model(tiny_config(block_pattern=pattern, num_layers=2))
    plain, given = model.init_cache(1), model.init_cache(1, capacity=3)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, given)


OVERFLOWING = {
    "global": tiny_config(block_pattern=("global_attention",), num_layers=2),
    "gemma2-wide": CONFIGS["gemma2-wide"],
}


@pytest.fixture(params=OVERFLOWING)
def overflown(request):
    """A model, and a cache of one row that lost tokens, one that is full, one that is
    new."""
    config = OVERFLOWING[request.param]
    model = random_model(config)
    positions = np.array([[*range(8)], [*range(6), -1, -1], [*range(6), 0, 1]])
    start = cache_lib.make_rewindable(model.init_cache(3, capacity=6), config, 4)
    return model, forward(model, random_tokens((3, 8)), positions, start)[1]


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("size", [1, 2])
def test_an_overflow_shows_after_the_tokens_were_taken_back(count, size, overflown):
    """NaN under jit, until the row's next document."""
    model, cache = overflown
    counts = np.array([count, 2, 0])
    cache = cache_lib.rewind(cache, model.config, counts)
    positions = np.array([[8 - count, 9 - count], [4, 5], [2, 3]])[:, :size]
    logits, cache = forward(model, random_tokens((3, size)), positions, cache)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1:]).all()
    grown = jax.jit(cache_lib.grow, static_argnums=(1, 2))(cache, model.config, 64)
    logits, _ = forward(model, random_tokens((3, 1)), None, grown)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1:]).all()
    tokens, restart = random_tokens((3, 4)), np.broadcast_to(np.arange(4), (3, 4))
    logits, _ = forward(model, tokens, restart, grown)
    expected, _ = forward(model, tokens)
    assert_close(logits, expected, "logits")


@pytest.mark.parametrize("count", [0, 4])
def test_an_overflow_is_an_error_outside_jit(count, overflown):
    model, cache = overflown
    cache = cache_lib.rewind(cache, model.config, np.array([count, 2, 0]))
    with pytest.raises(ValueError, match="cache: expected rows .* row 0"):
        model(random_tokens((3, 1)), cache=cache)
    with pytest.raises(ValueError, match="cache: expected rows .* row 0"):
        cache_lib.grow(cache, model.config, 64)
    others = cache_lib.take(cache, [1, 2])
    hidden, _ = model(random_tokens((2, 1)), cache=others)
    assert np.isfinite(hidden).all()
    restart = np.array([[0], [-1], [-1]])
    hidden, _ = model(random_tokens((3, 1)), restart, cache)
    assert np.isfinite(hidden).all()


@pytest.mark.slow
def test_growing_makes_room_and_changes_nothing():
    config = tiny_config(block_pattern=("global_attention", "recurrent"))
    model = random_model(config)
    tokens = random_tokens((2, 60))
    positions = np.array([[*range(30)], [*range(9), *[-1] * 21]])
    cache = forward(model, tokens[:, :30], positions, model.init_cache(2, capacity=30))
    grown = cache_lib.grow(cache[1], config, 64)
    assert grown.capacity == 64
    large = forward(model, tokens[:, :30], positions, model.init_cache(2, capacity=64))
    logits, _ = forward(model, tokens[:, 30:], None, grown)
    expected, _ = forward(model, tokens[:, 30:], None, large[1])
    assert_close(logits, expected, "logits")
    local = random_model(tiny_config()).init_cache(2)
    assert cache_lib.grow(local, tiny_config(), 64) is local


@pytest.mark.parametrize(
    "positions",
    [
        [[0, 1, 2, 3]],
        [[-1, 0, -1, 1]],
        [[7, 8, 0, 1]],
        [[0, 0, 0, 1]],
        [[-1, -1, 100, 101]],
    ],
)
def test_legal_positions(positions):
    check_positions(np.array(positions))


@pytest.mark.parametrize(
    ("positions", "place"),
    [
        ([[0, 2, 3, 4]], r"\[0, 1\]: .* or 1 .*, got 2"),
        ([[0, 1], [5, 5]], r"\[1, 1\]: .* or 6 .*, got 5"),
        ([[-2, 0]], r"\[0, 0\]: .*, got -2"),
    ],
)
def test_illegal_positions(positions, place):
    with pytest.raises(ValueError, match=place):
        check_positions(np.array(positions))


def test_positions_continue_a_row():
    check_positions(np.array([[4, 5]]), next_position=np.array([4]))
    with pytest.raises(ValueError, match="or 4"):
        check_positions(np.array([[5, 6]]), next_position=np.array([4]))
    with pytest.raises(ValueError, match="integers"):
        check_positions(np.zeros(3))


@pytest.mark.parametrize("kind", TEMPORAL_MIXERS)
def test_a_gradient_of_the_cache_is_that_of_a_small_change(kind):
    """Along a random direction, for each floating-point leaf; the counters stay."""
    config = tiny_config(block_pattern=(kind,), num_layers=2, mlp_width=0)
    model = random_model(config)
    empty = model.init_cache(2, capacity=12)
    cache = forward(model, random_tokens((2, 8)), None, empty)[1]
    tokens = random_tokens((2, 2), seed=4)

    @jax.jit
    def value(values):
        logits, after = forward(model, tokens, None, cache.with_floating(values))
        return jnp.sum(jnp.sin(logits)), after.next_position

    gradient, next_position = jax.grad(value, has_aux=True)(cache.floating())
    np.testing.assert_array_equal(next_position, [10, 10])
    assert gradient.keys() == cache.floating().keys()
    size = 1e-2
    for i, (name, leaf) in enumerate(cache.floating().items()):
        step = size * jax.random.normal(jax.random.key(i), leaf.shape)
        up, down = (
            value(cache.floating() | {name: leaf + sign * step})[0] for sign in (1, -1)
        )
        slope = float(jnp.sum(gradient[name] * step))
        assert slope != 0, name
        np.testing.assert_allclose((up - down) / 2, slope, rtol=0.02, atol=2e-4)


def test_values_of_a_cache_are_replaced_by_name(cache):
    values = cache.floating()
    assert "layers.0.h" in values and "layers.2.keys" in values
    assert "next_position" not in values and "layers.2.positions" not in values
    changed = cache.with_floating({n: 2 * np.asarray(x) for n, x in values.items()})
    for ours, old in zip(jax.tree.leaves(changed), jax.tree.leaves(cache), strict=True):
        factor = 2 if np.issubdtype(old.dtype, np.floating) else 1
        np.testing.assert_array_equal(ours, factor * np.asarray(old))
        assert ours.dtype == old.dtype
    with pytest.raises(ValueError, match="values: expected the names .*layers.7"):
        cache.with_floating(values | {"layers.7": values["layers.0.h"]})
    with pytest.raises(ValueError, match=r"values\['layers.0.h'\]: expected floating"):
        cache.with_floating(values | {"layers.0.h": values["layers.0.h"][:1]})
    with pytest.raises(ValueError, match=r"values\['layers.0.h'\]: expected floating"):
        cache.with_floating(values | {"layers.0.h": np.zeros((3, 32), np.int32)})
