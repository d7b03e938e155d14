"""A learned prefix: the loss after it, what it learns, and that it is an ordinary one."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import Sampler
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.training.data import Batch
from recurrentgemma.training.learned_prefix import (
    LearnedPrefixConfig,
    after_prefix,
    learn_prefix,
    loss_after,
    num_values,
    one_document_rows,
    prefix_sums,
    shuffled_batches,
)
from tests.models import random_model, random_tokens, tiny_config
from tests.tolerances import assert_close

PATTERN = ("min_gru", "local_attention")
READ = 9
LENGTH = 12


@pytest.fixture(scope="module")
def sampler():
    config = tiny_config(block_pattern=PATTERN, num_layers=2, mlp_width=0)
    return Sampler(random_model(config), compile_ahead=False)


@pytest.fixture(scope="module")
def start(sampler):
    return sampler.prefill(np.asarray(random_tokens((READ,), seed=1)).tolist())


def batch_of(positions):
    tokens = np.asarray(random_tokens((len(positions), LENGTH + 1), seed=2))
    positions = np.array(positions, np.int32)
    following = np.pad(positions[:, 1:], ((0, 0), (0, 1)), constant_values=1)
    mask = ((positions >= 0) & (following > 0)).astype(np.float32)
    return Batch(tokens[:, :-1], positions, tokens[:, 1:], mask)


ONE_DOCUMENT = batch_of([[*range(LENGTH)], [-1, *range(9), -1, -1]])


def test_rows_go_on_after_the_prefix_like_scored_text(sampler, start):
    """The begin token makes room for the last token of the prefix."""
    sums = prefix_sums(sampler.model, start.cache.floating(), start, ONE_DOCUMENT)
    documents = [
        row[is_counted > 0].tolist()
        for row, is_counted in zip(ONE_DOCUMENT.targets, ONE_DOCUMENT.mask, strict=True)
    ]
    scores = sampler.score_many(documents, prefix=start)
    expected = -sum(score.total_log_prob for score in scores)
    assert sums["tokens"] == sum(map(len, documents)) == LENGTH + 8
    assert_close(sums["loss"] / sums["tokens"], expected / sums["tokens"], "loss")


def test_further_documents_of_a_row_do_not_count():
    batch = batch_of([[*range(5), *range(7)], [3, 4, 5, *range(4), -1, *range(4)]])
    cache = Sampler(random_model(tiny_config()), compile_ahead=False).model.init_cache(
        2
    )
    cache = type(cache)(cache.layers, jnp.array([7, 2]))
    read = after_prefix(cache, jnp.array([11, 12]), batch)
    np.testing.assert_array_equal(
        read.positions,
        [[7, 8, 9, 10, 11, *range(7)], [2, 3, 4, *range(4), -1, *range(4)]],
    )
    np.testing.assert_array_equal(read.mask.sum(1), [4, 2])
    assert read.tokens[0, 0] == 11 and read.tokens[1, 0] == batch.tokens[1, 0]
    np.testing.assert_array_equal(read.tokens[:, 1:], batch.tokens[:, 1:])


def test_it_is_learned_and_is_an_ordinary_prefix(sampler, start, tmp_path):
    config = LearnedPrefixConfig(steps=30, learning_rate=0.1, chunk_tokens=5)
    batches = itertools.repeat(ONE_DOCUMENT)
    model = sampler.model
    learned, losses = learn_prefix(model, start, batches, config)
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0]
    sums = prefix_sums(model, start.cache.floating(), start, ONE_DOCUMENT)
    assert_close(losses[0], sums["loss"] / sums["tokens"], "loss")

    learned.save(tmp_path / "learned.prefix")
    loaded = Prefix.load(tmp_path / "learned.prefix", model)
    [before], [after] = (
        sampler.score_many([ONE_DOCUMENT.targets[0].tolist()], prefix=prefix)
        for prefix in (start, loaded)
    )
    assert after.total_log_prob > before.total_log_prob
    assert loaded.num_bytes == start.num_bytes
    np.testing.assert_array_equal(loaded.num_tokens, start.num_tokens)


def test_its_values_are_counted(sampler, start):
    """A ring of 6 slots that are all held, one head of 8; a state of 32 channels."""
    assert num_values(start) == 2 * 6 * 8 + 32
    short = sampler.prefill([1, 2, 3])
    assert num_values(short.repeat(2)) == 2 * 2 * 8 + 32


def test_what_cannot_be_learned_is_refused(sampler, start):
    model = sampler.model
    with pytest.raises(ValueError, match="prefix: expected one row, got 2"):
        learn_prefix(model, start.repeat(2), [])
    with pytest.raises(ValueError, match="prefix: expected at least two tokens"):
        learn_prefix(model, sampler.prefill([2]), [])
    with pytest.raises(ValueError, match="batches: expected 200 of them, got 0"):
        learn_prefix(model, start, [])
    other = random_model(
        tiny_config(block_pattern=PATTERN, num_layers=2, mlp_width=0), seed=1
    )
    with pytest.raises(ValueError, match="other weights"):
        learn_prefix(other, start, [])
    with pytest.raises(ValueError, match="learning_rate: expected"):
        LearnedPrefixConfig(learning_rate=0)


def test_rows_hold_one_document_each():
    """Every token after the begin token is a target once."""
    rows = one_document_rows([[2, 5, 6, 7, 8, 9], [2], [2, 4]], 3)
    np.testing.assert_array_equal(rows.tokens, [[2, 5, 6], [2, 8, 9], [2, 4, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2], [0, 1, -1], [0, -1, -1]])
    counted = rows.targets[rows.mask > 0]
    np.testing.assert_array_equal(counted, [5, 6, 7, 8, 9, 4])
    with pytest.raises(ValueError, match="documents: expected a token after"):
        one_document_rows([[2]], 3)
    seen = itertools.islice(shuffled_batches(rows, 2, seed=1), 3)
    firsts = [batch.tokens[:, 1].tolist() for batch in seen]
    once, twice = np.concatenate(firsts).reshape(2, 3)
    assert sorted(once) == sorted(twice) == [4, 5, 8]


def test_the_loss_after_a_prefix_is_that_of_all_rows(sampler, start):
    """The last batch is not full."""
    rows = one_document_rows([[2, *range(3, 30)]], 10)
    found = loss_after(sampler.model, start, rows, batch_size=2)
    sums = prefix_sums(sampler.model, start.cache.floating(), start, rows)
    assert_close(found, sums["loss"] / sums["tokens"], "loss")
