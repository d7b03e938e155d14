"""Questions of JSONL files: what is asked, what counts as right, and mistakes."""

import json

import numpy as np
import pytest

from recurrentgemma.checkpoints import load
from recurrentgemma.evaluation import tasks
from recurrentgemma.evaluation.perplexity import TextFigures
from recurrentgemma.evaluation.scorer import LogLikelihood, Scorer
from recurrentgemma.evaluation.tasks import TaskSettings, accuracy, find_number
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from tests.models import random_model, tiny_config

CHOICES = [
    {
        "prompt": f"Q: {n} + 1?\nA:",
        "choices": [f" {n}", f" {n + 1}", " no"],
        "answer": 1,
    }
    for n in range(1, 6)
]
TEXTS = [
    {"prompt": "Q: 2 + 2?\nA:", "answer": " 4"},
    {
        "prompt": "Q: 3 + 2?\nA:",
        "answer": ["five", "The answer is 5."],
        "match": "number",
    },
]


@pytest.fixture(scope="module")
def sampler():
    tokenizer = load("nano")[1]
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_layers=1)
    return Sampler(random_model(config), tokenizer, compile_ahead=False)


@pytest.fixture
def write(tmp_path):
    def write(rows, name="items.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


class Knowing(Scorer):
    """Takes the longest number for right, and writes a fixed text."""

    def log_likelihoods(self, requests):
        for i, (context, tokens) in enumerate(requests):
            whole = self.tokenizer.decode([*context, *tokens])
            n, answer = whole.rpartition("Q: ")[2].split(" + 1?\nA:")
            is_right = answer.strip() == str(int(n) + 1)
            yield i, LogLikelihood(-1.0 if is_right else -9.0, is_right)

    def texts(self, requests):
        for i, request in enumerate(requests):
            self.asked = self.tokenizer.decode(request.context)
            yield i, " 4" if "2 + 2" in self.asked else "So, The answer is 5 then, 7"


def test_a_model_that_always_answers_right_scores_one(sampler, write):
    items = tasks.read_items(write([*CHOICES, *TEXTS]))
    rows = tasks.evaluate(Knowing(sampler), items)
    assert accuracy(rows) == {
        "items": 7,
        "accuracy": 1.0,
        "accuracy_by_length": 1.0,
    }
    assert [row["line"] for row in rows] == list(range(1, 8))
    wrong = [row | {"answer": 0} for row in CHOICES[:3]]
    rows = tasks.evaluate(
        Knowing(sampler), tasks.read_items(write(wrong + CHOICES[3:]))
    )
    assert accuracy(rows)["accuracy"] == pytest.approx(2 / 5)


def test_answers_are_those_of_plain_calls(sampler, write):
    """With examples, which are read once."""
    items = tasks.read_items(write([*CHOICES, TEXTS[0]]))
    examples = tuple(items[:2]) * 4
    settings = TaskSettings(examples, "Sums.", max_new_tokens=5, stop=("\n",))
    scorer = Scorer(sampler, batch_size=2)
    rows = tasks.evaluate(scorer, items[2:], settings)
    shots = "".join(e.prompt + e.answers[0] + "\n\n" for e in examples)
    total = 0
    for row, item in zip(rows, items[2:], strict=True):
        prompt = f"Sums.\n\n{shots}{item.prompt}"
        total += len(prompt) * len(item.choices or "x")
        if item.choices is None:
            [sample] = sampler(
                [prompt], max_new_tokens=5, stop=["\n"], sampling=Sampling(0)
            )
            assert row["text"] == sample.text
            continue
        found = []
        for choice in item.choices:
            whole = sampler.score(prompt + choice)
            count = len(sampler.tokenizer.encode(prompt)) - 1
            found.append(float(np.sum(whole.log_probs[count:])))
        assert row["log_probs"] == pytest.approx(found, rel=1e-4)
        assert row["choice"] == np.argmax(found)
        by_length = [p / len(c) for p, c in zip(found, item.choices, strict=True)]
        assert row["correct_by_length"] == (np.argmax(by_length) == 1)
    assert scorer.tokens_read < total / 5


def test_spaces_at_the_end_of_a_prompt_go_with_the_choice(sampler):
    for prompt in ("Q: 1 + 1?\nA:", "Q: 1 + 1?\nA: "):
        one = tasks._continuation(
            Scorer(sampler), prompt, " 2".removeprefix(prompt[-1:])
        )
        decoded = sampler.tokenizer.decode([*one.context, *one.tokens])
        assert decoded == "Q: 1 + 1?\nA: 2"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("no number", None),
        ("3 and 4", 4),
        ("It is 5,600.50 dollars", 5600.5),
        ("1, 2. The answer is -7. Or 9?", -7),
        ("The answer is 1. No! The answer is 2 apples, 3", 2),
        ("The answer is hard: 8", 8),
        ("It is .5", 0.5),
        ("7. The answer is", 7),
    ],
)
def test_the_number_of_an_answer(text, number):
    assert find_number(text) == number


@pytest.mark.parametrize(
    ("match", "text", "answer", "expected"),
    [
        ("exact", " Paris\n", "Paris", True),
        ("exact", "Paris.", "Paris", False),
        ("start", " Paris, of course", " Paris", True),
        ("contains", "It is PARIS", "paris", True),
        ("number", "It is 5,000", "#### 5000", True),
        ("number", "none", "none", False),
    ],
)
def test_matches(match, text, answer, expected):
    assert tasks.MATCHES[match](text, answer) is expected


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "Expecting property name"),
        ("[1]", "item: expected a JSON object"),
        ('{"answer": "a"}', "prompt: expected a text"),
        ('{"prompt": "a"}', "answer: expected a list of strings"),
        ('{"prompt": "a", "answer": []}', "answer: expected a text or a list"),
        ('{"prompt": "a", "answer": 3}', "answer: expected a list of strings"),
        (
            '{"prompt": "a", "answer": "b", "match": "x"}',
            "match: expected one of exact",
        ),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "choices: expected a list"),
        (
            '{"prompt": "a", "choices": ["b", 2], "answer": 0}',
            "choices: expected a list",
        ),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer: expected"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "b"}', "answer: expected"),
        ("[" * 10**5, "."),
        ("\ud800", "utf-8"),
    ],
)
def test_a_bad_line_is_named(line, match, write):
    path = write(CHOICES[:2])
    with path.open("ab") as file:
        file.write(b"\n" + line.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=rf"items.jsonl, line 4: .*{match}"):
        tasks.read_items(path)


def test_other_mistakes_are_told(write, tmp_path):
    with pytest.raises(ValueError, match="items.jsonl: expected a JSON object on each"):
        tasks.read_items(write([]))
    with pytest.raises(FileNotFoundError):
        tasks.read_items(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="match: expected one of exact"):
        TaskSettings(match="near")
    with pytest.raises(ValueError, match="max_new_tokens: expected"):
        TaskSettings(max_new_tokens=0)
    assert len(tasks.read_items(write(CHOICES), limit=2)) == 2


def test_text_figures_are_those_of_the_whole_text(sampler):
    """Line by line, of a text that nobody holds at once."""
    line, taken = "def add(a, b):\n    return a + b  # ☃\n", []

    def lines():
        for i in range(120):
            taken.append(i)
            yield line

    figures, ahead = TextFigures(), []
    for score in sampler.score_stream(lines()):
        figures = figures.add(score)
        ahead.append(len(taken) * len(line.encode()) - figures.bytes)
    whole = sampler.score(lines())
    assert figures.bytes == 120 * len(line.encode()) and len(ahead) > 1
    assert figures.tokens == len(whole.tokens) and max(ahead) <= len(line.encode())
    assert figures.perplexity == pytest.approx(whole.perplexity)
    assert figures.bits_per_byte == pytest.approx(whole.bits_per_byte)
    assert np.isnan([TextFigures().perplexity, TextFigures().bits_per_byte]).all()
