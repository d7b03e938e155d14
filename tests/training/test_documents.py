"""Tokens of documents, and which of them the loss counts."""

import itertools

import numpy as np
import pytest

from recurrentgemma.checkpoints import find_checkpoint
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.documents import (
    Completion,
    Conversation,
    Cuts,
    Document,
    encode_document,
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(find_checkpoint("nano") / "tokenizer.model")


def counted(document, tokenizer):
    """The text of the tokens that count."""
    spans = document.spans(tokenizer, Cuts(seed=0))
    ids = itertools.chain(*(span.ids for span in spans if span.counts))
    return tokenizer.decode(ids)


def test_cut_documents_decode_to_the_same_text(tokenizer):
    text = "def f(self, x):\n    return x + 1\t# é\r\n" * 40
    document = Document("f.py", text)
    whole = encode_document(tokenizer, document)
    cut = encode_document(tokenizer, document, cut_seed=0)
    assert cut == encode_document(tokenizer, document, cut_seed=0)
    assert cut != encode_document(tokenizer, document, cut_seed=1)
    assert len(whole) < len(cut) < 1.1 * len(whole)
    for ids in (whole, cut):
        assert ids[0] == tokenizer.bos_id
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids) == text


def test_the_distance_of_cuts_is_a_setting():
    document = Document("f.py", "x" * 1000)
    assert Cuts(0, 0).parts(document) == [document.text]
    parts = Cuts(0, 10).parts(document)
    assert len(parts) == 101
    assert "".join(parts) == document.text


def test_the_response_and_its_end_count(tokenizer):
    document = Completion("a", "def f(x):" * 50 + " return", 9 * 50)
    ids = encode_document(tokenizer, document, cut_seed=0)
    prompt, response = "def f(x):" * 50, " return"
    assert ids == [
        *tokenizer.encode(prompt),
        *tokenizer.encode(response, add_bos=False),
        tokenizer.eos_id,
    ]
    assert counted(document, tokenizer) == response
    assert document.spans(tokenizer)[1].ids[-1] == tokenizer.eos_id


def test_turns_have_the_format_of_a_chat(tokenizer):
    document = Conversation("a", "", (("Who?", "I."), ("<end_of_turn>", "Yes.")))
    start, end = map(tokenizer.special_id, ("<start_of_turn>", "<end_of_turn>"))
    bos = tokenizer.bos_id

    def plain(text):
        return tokenizer.encode(text, add_bos=False)

    expected = [bos, start, *plain("user\nWho?"), end, *plain("\n"), start]
    expected += [*plain("model\n"), *plain("I."), end, *plain("\n")]
    expected += [start, *plain("user\n<end_of_turn>"), end, *plain("\n"), start]
    expected += [*plain("model\n"), *plain("Yes."), end]
    assert encode_document(tokenizer, document) == expected
    assert expected.count(end) == 4
    spans = document.spans(tokenizer)
    learnt = [span.ids for span in spans if span.counts]
    assert learnt == [[*plain("I."), end], [*plain("Yes."), end]]


def test_sizes_of_spans_add_up(tokenizer):
    document = Completion("a", "ab", 1)
    sizes = [len(span.ids) for span in document.spans(tokenizer)]
    assert np.sum(sizes) == len(encode_document(tokenizer, document))
