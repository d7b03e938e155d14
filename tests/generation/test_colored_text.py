"""Colours of tokens: the text is whole, and the darkness is the probability's."""

import re

import numpy as np
import pytest

from recurrentgemma import load
from recurrentgemma.generation.colored_text import ColoredText
from recurrentgemma.generation.results import Sample, Score


@pytest.fixture(scope="module")
def tokenizer():
    return load("nano")[1]


def _score(tokens, log_probs):
    return Score(tokens, np.array(log_probs, np.float32), None, None)  # type: ignore


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "ä → 🙂!", "a<b & c"])
def test_the_pieces_are_the_text_and_their_sum_is_the_total(tokenizer, text):
    tokens = tokenizer.encode(text, add_bos=False)
    score = _score(tokens, -np.arange(1.0, len(tokens) + 1))
    colored = score.colored(tokenizer)
    assert str(colored) == text
    total = sum(log_prob for _, log_prob in colored.pieces)
    assert total == pytest.approx(score.total_log_prob)


def test_bytes_of_one_character_are_one_piece(tokenizer):
    tokens = tokenizer.encode("🙂", add_bos=False)
    assert sum(tokenizer.byte_of(token) is not None for token in tokens) > 1
    colored = _score(tokens, [-1.0] * len(tokens)).colored(tokenizer)
    assert "🙂" in [text for text, _ in colored.pieces]


def test_an_incomplete_character_at_the_end_is_shown(tokenizer):
    tokens = tokenizer.encode("a🙂", add_bos=False)[:-1]
    colored = _score(tokens, [-1.0] * len(tokens)).colored(tokenizer)
    assert str(colored) == tokenizer.decode(tokens)
    assert sum(log_prob for _, log_prob in colored.pieces) == -len(tokens)


def test_a_sample_is_coloured_alike(tokenizer):
    tokens = tokenizer.encode("import os", add_bos=False)
    log_probs = np.full(len(tokens), -0.5, np.float32)
    sample = Sample("import os", [], tokens, log_probs, True, 1)
    assert sample.colored(tokenizer) == _score(tokens, log_probs).colored(tokenizer)


def test_html_is_escaped_and_darker_where_less_probable():
    log_probs = np.log([1.0, 0.1, 0.01, 1e-3, 1e-9])
    texts = ["<a>", "&", '"', "d", "e"]
    colored = ColoredText(list(zip(texts, log_probs, strict=True)))
    text, legend, _ = colored._repr_html_().split("</pre>")
    shown = re.findall(r'title="(.+?)" style="background:rgb\((.+?)\)">(.*?)<', text)
    assert [piece for *_, piece in shown] == ["&lt;a&gt;", "&amp;", "&quot;", "d", "e"]
    assert [title for title, *_ in shown] == ["1", "0.1", "0.01", "0.001", "1e-09"]
    blues = [int(color.split(",")[2]) for _, color, _ in shown]
    assert blues[0] == 255 and blues[0] > blues[1] > blues[2] > blues[3] == blues[4]
    assert "probability" in legend
