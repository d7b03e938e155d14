"""How the card's samples are cut and judged, and its bits per byte."""

import math

import numpy as np
import pytest

from recurrentgemma.benchmarks.nano_card import (
    complete_statements,
    held_out_loss,
    is_python,
    xz_bits_per_byte,
)
from recurrentgemma.generation.sampler import Sample
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import Document
from recurrentgemma.training.loop import BUNDLED_TOKENIZER
from tests.models import random_model, tiny_config


def sample_of(text, *, ended):
    return Sample(text, [2], [], np.zeros(0, np.float32), ended, num_calls=0)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("import os\n\ndef f():\n    return (1", "import os\n\n"),
        ("x = [\n    1,\n]\ny = 2\n# note", "x = [\n    1,\n]\n"),
        ("import o", ""),
        ("", ""),
    ],
)
def test_an_unfinished_sample_loses_its_last_statement(text, kept):
    assert complete_statements(sample_of(text, ended=False)) == kept
    assert complete_statements(sample_of(text, ended=True)) == text


@pytest.mark.parametrize(
    ("text", "accepted"),
    [("x = 1\n", True), ("x = (\n", False), (" \n", False), ("x = '\0'", False)],
)
def test_what_counts_as_python(text, accepted):
    assert is_python(text) == accepted


def test_a_model_that_knows_nothing_needs_all_bits_of_a_token():
    model = random_model(tiny_config(vocab_size=4096, num_layers=1))
    # Without an embedding all logits are 0.
    model.embedder.embedding[...] = 0 * model.embedder.embedding[...]
    tokenizer = Tokenizer(BUNDLED_TOKENIZER)
    documents = [Document("a", "x = 1\n" * 50), Document("b", "é")]
    figures = held_out_loss(model, tokenizer, documents, row_tokens=16)
    tokens = sum(len(tokenizer.encode(d.text)) for d in documents)
    assert figures["loss"] == pytest.approx(math.log(4096))
    assert figures["bits_per_byte"] == pytest.approx(12 * tokens / 302)


def test_xz_compresses_the_documents_together():
    document = Document("a", "".join(map(str, range(1000))))
    once, twice = xz_bits_per_byte([document]), xz_bits_per_byte([document] * 2)
    assert twice < 0.6 * once
