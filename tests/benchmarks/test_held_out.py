"""Bits per byte of models and of xz."""

import math

import pytest

from recurrentgemma.benchmarks.held_out import held_out_loss, xz_bits_per_byte
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import Document
from recurrentgemma.training.start import BUNDLED_TOKENIZER
from tests.models import random_model, tiny_config


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
