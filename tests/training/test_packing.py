"""Packed rows: each target once, and packed documents do not meet."""

import jax
import numpy as np
import pytest

from recurrentgemma.chunk import check_positions
from recurrentgemma.training.packing import PackedTokens
from recurrentgemma.training.step import batch_sums, mean_metrics, means
from recurrentgemma.training.streams import TokenStream
from tests.models import random_model, tiny_config
from tests.tolerances import assert_close

# Token 2 begins a document, 1 ends it; no other token is used twice.
DOCUMENTS = [[2, 10, 11, 12, 1], [2, 1], [2, 20, 21, 1], [2, 30, 31, 32, 33, 34, 1]]


@pytest.mark.parametrize("row_tokens", [1, 3, 4, 17, 100])
def test_rows_hold_every_target_once(row_tokens):
    packed = PackedTokens(DOCUMENTS, row_tokens)
    batch = packed.rows(np.arange(packed.num_rows + 1))
    assert batch.tokens.shape == (packed.num_rows + 1, row_tokens)
    assert (batch.positions[-1] == -1).all()
    counted = batch.targets[batch.mask > 0]
    expected = [token for document in DOCUMENTS for token in document[1:]]
    np.testing.assert_array_equal(counted, expected)
    # Each counted target follows its input in one document.
    index = {t: (d, i) for d, ids in enumerate(DOCUMENTS) for i, t in enumerate(ids)}
    unique = (batch.mask > 0) & (batch.tokens > 2) & (batch.targets > 2)
    for token, target, position in zip(
        batch.tokens[unique],
        batch.targets[unique],
        batch.positions[unique],
        strict=True,
    ):
        document, place = index[token]
        assert index[target] == (document, place + 1)
        assert position == place
    check_positions(batch.positions)


def test_evaluation_batches_have_every_row_in_order():
    packed = PackedTokens(DOCUMENTS, 4)
    batches = list(packed.batches(2))
    tokens = np.concatenate([batch.targets[batch.mask > 0] for batch in batches])
    np.testing.assert_array_equal(tokens, [t for d in DOCUMENTS for t in d[1:]])
    assert len(list(packed.batches(2, limit=1))) == 1


@pytest.mark.parametrize(("documents", "row_tokens"), [(DOCUMENTS, 0), ([[2]], 4)])
def test_rows_that_cannot_be_are_refused(documents, row_tokens):
    with pytest.raises(ValueError, match="expected two tokens|of at least 1"):
        PackedTokens(documents, row_tokens)


# Prompts of 2, 1, 5 and 1 tokens, BOS included; the third response begins late.
RESPONSES = [([2, 10], [11, 1]), ([2], [20, 21, 1]), ([2, *range(30, 34)], [34, 1])]
RESPONSES += [([2], [40, 41, 42, 43, 1])]


def with_responses(examples):
    tokens = [prompt + response for prompt, response in examples]
    counted = [[False] * len(p) + [True] * len(r) for p, r in examples]
    return TokenStream(
        np.concatenate(tokens).astype(np.int32),
        np.concatenate([np.arange(len(ids), dtype=np.int32) for ids in tokens]),
        np.concatenate(counted),
        has_responses=True,
    )


def test_whole_documents_are_never_parted():
    examples = RESPONSES[:3] + RESPONSES[:2]
    packed = PackedTokens(with_responses(examples), 7, whole=True)
    batch = packed.rows(np.arange(packed.num_rows))
    np.testing.assert_array_equal(batch.targets[batch.mask > 0], targets(examples))
    # Two of 4 tokens fit into 7 + 1, the one of 7 leaves no room.
    assert batch.positions.tolist() == [
        [0, 1, 2, 3, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 0, 1, 2],
    ]
    assert (packed.num_shortened, packed.num_left_out) == (0, 0)


def targets(examples):
    return [token for _, response in examples for token in response]


def test_responses_that_do_not_fit_a_row_are_shortened_or_left_out():
    prompt = ([2, 50, 51], [52, 53, 54, 1])
    packed = PackedTokens(with_responses([*RESPONSES[:3], prompt]), 4, whole=True)
    batch = packed.rows(np.arange(packed.num_rows))
    counted = batch.targets[batch.mask > 0]
    np.testing.assert_array_equal(counted, [11, 1, 20, 21, 1, 52, 53])
    assert (packed.num_shortened, packed.num_left_out) == (1, 1)
    with pytest.raises(ValueError, match="^sequence_length: .* got 3, .* larger"):
        PackedTokens(with_responses(RESPONSES[2:3]), 3, whole=True)


def test_texts_among_responses_are_cut_into_rows():
    examples = [RESPONSES[0], ([2], [60, 61, 62, 63, 64, 65, 66, 1]), RESPONSES[1]]
    packed = PackedTokens(with_responses(examples), 4, whole=True)
    batch = packed.rows(np.arange(packed.num_rows))
    np.testing.assert_array_equal(batch.targets[batch.mask > 0], targets(examples))
    check_positions(batch.positions)
    assert (packed.num_shortened, packed.num_left_out) == (0, 0)


def test_a_stream_of_responses_counts_them_alone():
    packed = PackedTokens(with_responses(RESPONSES), 3)
    batch = packed.rows(np.arange(packed.num_rows))
    np.testing.assert_array_equal(batch.targets[batch.mask > 0], targets(RESPONSES))


def test_the_loss_of_packed_documents_is_that_of_each_alone():
    model = random_model(tiny_config())
    packed = PackedTokens(DOCUMENTS, 17)
    sums = jax.jit(lambda model, batch: batch_sums(model, batch)[0])
    together = sums(model, packed.rows(np.arange(1)))
    alone = [
        sums(model, PackedTokens([ids], 17).rows(np.arange(1))) for ids in DOCUMENTS
    ]
    assert float(together["tokens"]) == sum(map(len, DOCUMENTS)) - 4
    assert_close(mean_metrics(together)["loss"], means(alone)["loss"], "loss")
