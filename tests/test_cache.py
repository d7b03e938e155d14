"""Row operations on caches, and the check of positions."""

import jax
import numpy as np
import pytest

from recurrentgemma import cache as cache_lib
from tests.models import forward, random_model, random_tokens, tiny_config


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
    with pytest.raises(ValueError, match="at least 1"):
        cache_lib.repeat(cache, 0)
    with pytest.raises(ValueError, match="at least one"):
        cache_lib.concatenate([])
    other = random_model(tiny_config(attention_window=5)).init_cache(1)
    with pytest.raises(ValueError, match=r"caches\[1\] does not fit"):
        cache_lib.concatenate([cache, other])


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
    cache_lib.check_positions(np.array(positions))


@pytest.mark.parametrize(
    ("positions", "place"),
    [
        ([[0, 2, 3, 4]], r"\[0, 1\] is 2; .* or 1"),
        ([[0, 1], [5, 5]], r"\[1, 1\] is 5; .* or 6"),
        ([[-2, 0]], r"\[0, 0\] is -2"),
    ],
)
def test_illegal_positions(positions, place):
    with pytest.raises(ValueError, match=place):
        cache_lib.check_positions(np.array(positions))


def test_positions_continue_a_row():
    cache_lib.check_positions(np.array([[4, 5]]), next_position=np.array([4]))
    with pytest.raises(ValueError, match="or 4"):
        cache_lib.check_positions(np.array([[5, 6]]), next_position=np.array([4]))
    with pytest.raises(ValueError, match="integers"):
        cache_lib.check_positions(np.zeros(3))
