"""Batches of mixtures: shares, epochs, resuming, continuous rows."""

import doctest

import numpy as np
import pytest

from recurrentgemma.chunk import check_positions
from recurrentgemma.training import mixture
from recurrentgemma.training.mixture import Mixture, apportion
from recurrentgemma.training.packing import PackedTokens


def source(number, rows, row_tokens=2):
    """Rows whose first input is 1000 * number + the row's own number."""
    tokens = 1000 * number + np.arange(rows * row_tokens + 1) // row_tokens
    return PackedTokens([tokens], row_tokens)


def first_tokens(batches, **arguments):
    return np.concatenate([batch.tokens[:, 0] for batch in batches], **arguments)


def test_the_example():
    assert doctest.testmod(mixture).failed == 0
    assert doctest.testmod(mixture).attempted > 0


def test_one_source_has_each_row_once_an_epoch_in_another_order():
    rows = 25
    alone = Mixture([source(0, rows)], batch_size=2, seed=3)
    tokens = first_tokens(alone.batch(step) for step in range(rows))
    epochs = tokens[:rows], tokens[rows:]
    for epoch, order in enumerate(epochs):
        expected = np.random.default_rng([3, epoch]).permutation(rows)
        np.testing.assert_array_equal(order, expected)
    assert (epochs[0] != epochs[1]).any()


def test_a_batch_is_a_function_of_seed_and_step():
    sources = [source(0, 7), source(1, 50), source(2, 1)]
    arguments = {"weights": [0.7, 0.25, 0.05], "batch_size": 3}
    mixed = Mixture(sources, **arguments, seed=1)
    batches = [mixed.batch(step) for step in range(40)]
    for step in (39, 0, 17):
        again = Mixture(sources, **arguments, seed=1).batch(step)
        for array, expected in zip(again, batches[step], strict=True):
            np.testing.assert_array_equal(array, expected)
    other = Mixture(sources, **arguments, seed=2).batch(3)
    assert (other.tokens != batches[3].tokens).any()


def test_sources_keep_their_shares_and_their_epochs():
    sizes, weights = [7, 50, 1], [0.7, 0.25, 0.05]
    mixed = Mixture(
        [source(i, size) for i, size in enumerate(sizes)], weights, batch_size=4
    )
    tokens = first_tokens(mixed.batch(step) for step in range(300))
    which = tokens // 1000
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        counts = np.cumsum(which == number)
        expected = weight * np.arange(1, len(tokens) + 1)
        assert np.abs(counts - expected).max() <= 1.5
        rows = tokens[which == number] % 1000
        for epoch in range(len(rows) // size):
            whole = rows[epoch * size : (epoch + 1) * size]
            np.testing.assert_array_equal(np.sort(whole), np.arange(size))


def test_sources_without_weights_are_read_equally_often():
    mixed = Mixture([source(0, 30), source(1, 10)], batch_size=4)
    tokens = first_tokens(mixed.batch(step) for step in range(10))
    assert len(set(tokens)) == 40


def test_a_source_has_the_same_rows_whatever_it_is_mixed_with():
    alone = Mixture([source(0, 9)], batch_size=1, seed=5)
    mixed = Mixture([source(0, 9), source(1, 4)], [1, 2], batch_size=3, seed=5)
    tokens = first_tokens(mixed.batch(step) for step in range(18))
    expected = first_tokens(alone.batch(step) for step in range(18))
    np.testing.assert_array_equal(tokens[tokens < 1000], expected)


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ([0.7, 0.3], 10, [7, 3]),
        ([1, 1, 1], 10, [4, 3, 3]),
        ([1e6, 1, 1], 10, [8, 1, 1]),
        ([5.0], 4, [4]),
    ],
)
def test_apportioned_shares(weights, total, expected):
    shares = apportion(weights, total)
    assert sorted(shares.tolist(), reverse=True) == expected
    assert shares[0] == expected[0]


def test_evaluation_reads_every_row_once_mixed_by_weight():
    mixed = Mixture([source(0, 12), source(1, 6)], [2, 1], batch_size=5)
    batches = list(mixed.batches(4))
    exists = np.concatenate([batch.positions[:, 0] for batch in batches]) >= 0
    tokens = first_tokens(batches)[exists]
    assert len(batches) == 5 and len(tokens) == len(set(tokens)) == 18
    assert (tokens[:9] >= 1000).sum() == 3
    limited = list(mixed.batches(4, limit=2))
    np.testing.assert_array_equal(first_tokens(limited), first_tokens(batches)[:8])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_continuous_rows_go_on(batch_size):
    documents = [[2, *range(10 * n, 10 * n + size), 1] for n, size in [(1, 7), (2, 4)]]
    mixed = Mixture(
        [PackedTokens(documents * 5, 3)], batch_size=batch_size, order="continuous"
    )
    batches = [mixed.batch(step) for step in range(2 * mixed.num_rows)]
    for row in range(batch_size):
        parts = zip(
            *((array[row] for array in batch) for batch in batches), strict=True
        )
        tokens, positions, targets, mask = map(np.concatenate, parts)
        counts = mask[:-1] > 0
        np.testing.assert_array_equal(targets[:-1][counts], tokens[1:][counts])
        positions = positions[positions >= 0]
        begins, goes_on = positions[1:] == 0, np.diff(positions) == 1
        assert (begins | goes_on).all()
    check_positions(np.concatenate([batch.positions for batch in batches]))


def test_continuous_rows_cover_everything_in_an_epoch():
    mixed = Mixture([source(0, 10)], batch_size=4, order="continuous")
    tokens = first_tokens(mixed.batch(step) for step in range(3))
    assert set(tokens) == set(range(10))


def test_continuous_rows_belong_to_one_source():
    mixed = Mixture(
        [source(0, 10), source(1, 5)], [3, 1], batch_size=4, order="continuous"
    )
    for step in range(12):
        assert (mixed.batch(step).tokens[:, 0] // 1000).tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="batch_size: .* 2 sources .* got 1"):
        Mixture(mixed.sources, [3, 1], batch_size=1, order="continuous")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [1, 0]}, "weights: .* above 0, got 0"),
        ({"weights": [1, float("nan")]}, "weights: .* got nan"),
        ({"weights": [1]}, "weights: expected one for each of 2"),
        ({"order": "sorted"}, "order: expected one of shuffled, continuous"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments(arguments, message):
    sources = [source(0, 3), source(1, 3)]
    with pytest.raises(ValueError, match=message):
        Mixture(sources, **{"batch_size": 2, **arguments})
    with pytest.raises(ValueError, match="rows of one length"):
        Mixture([source(0, 3), source(1, 3, row_tokens=3)], batch_size=2)


def test_an_order_is_made_once_an_epoch(monkeypatch):
    made = []
    permutation = mixture._permutation
    monkeypatch.setattr(
        mixture, "_permutation", lambda *key: made.append(key) or permutation(*key)
    )
    sources = [source(i, 20) for i in range(4)]
    mixed = Mixture(sources, [1, 1, 1, 1], batch_size=3)
    for step in range(3 * 80 // 3):
        mixed.batch(step)
    assert len(made) == len(set(made)) == 4 * 3
