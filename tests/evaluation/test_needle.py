"""Prompts hold the needle where they should, and figures say what a model does."""

import numpy as np
import pytest

from recurrentgemma.checkpoints import load
from recurrentgemma.evaluation import needle
from recurrentgemma.evaluation.needle import KINDS, NeedleSettings
from recurrentgemma.evaluation.scorer import Continuation, LogLikelihood, Scorer
from recurrentgemma.generation.sampler import Sampler
from tests.models import random_model, tiny_config

TEXT = "The ferry leaves twice a day in winter. It is a small boat, painted white.\n"
SETTINGS = NeedleSettings(
    lengths=(150, 300), distances=(0, 0.5, 2), window=40, samples=4, choices=4
)


@pytest.fixture(scope="module")
def sampler():
    tokenizer = load("nano")[1]
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_layers=1)
    return Sampler(random_model(config), tokenizer, compile_ahead=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [0, 33, 200])
def test_prompts_have_the_needle_at_its_distance(sampler, kind, distance):
    tokenizer = sampler.tokenizer
    found = needle.prompts(tokenizer, kind, TEXT, 500, distance, SETTINGS)
    assert len(found) == 4
    rights = []
    for prompt in found:
        assert len(prompt.tokens) == 500 and prompt.tokens[0] == tokenizer.bos_id
        text = tokenizer.decode(prompt.tokens[1:])
        right, *wrong = prompt.numbers
        rights.append(right)
        assert right in text and not any(number in text for number in wrong)
        assert len(set(prompt.numbers)) == 4
        for answer, number in zip(prompt.answers, prompt.numbers, strict=True):
            assert tokenizer.decode(answer).strip() == number
        start, end = KINDS[kind].needle.split("{answer}")[0], KINDS[kind].question
        city = text.rpartition(" is")[0].rpartition(" ")[2]
        assert text.endswith(end.replace("{city}", city))
        assert text.count(start.replace("{city}", city) + right) == 1
        behind = text.rpartition(right)[2].removesuffix(end.replace("{city}", city))
        # The sentence's end stands between, too.
        between = len(tokenizer.encode(behind, add_bos=False))
        assert distance <= between + 2 and between < distance + 60
        others = text.count("The special number of") - 1
        assert others == (KINDS[kind].others + 1 if kind.endswith("needle") else -1)
    assert sorted(rights) == sorted(found[0].numbers), "each is right in turn"


def test_other_needles_stay_whole(sampler):
    for distance in range(0, 300, 7):
        [prompt, *_] = needle.prompts(
            sampler.tokenizer, "multi_needle", TEXT, 500, distance, SETTINGS
        )
        text = sampler.tokenizer.decode(prompt.tokens[1:])
        whole = [
            line for line in text.split("\n") if line.endswith(".") and "of" in line
        ]
        needles = [line for line in whole if line.startswith("The special number of")]
        assert len(needles) == 8, text


def test_what_does_not_fit_is_left_out(sampler):
    assert needle.prompts(sampler.tokenizer, "needle", TEXT, 100, 90, SETTINGS) is None
    assert (
        needle.prompts(sampler.tokenizer, "multi_needle", TEXT, 90, 1, SETTINGS) is None
    )
    rows = list(needle.measure(Remembering(sampler), TEXT, SETTINGS))
    assert {
        (row["length"], row["windows"]) for row in rows if row["kind"] == "needle"
    } == {
        *((150, windows) for windows in (0, 0.5, 2)),
        *((300, windows) for windows in (0, 0.5, 2)),
    }
    with pytest.raises(ValueError, match="text: expected at least one token"):
        needle.prompts(sampler.tokenizer, "needle", "", 100, 1, SETTINGS)


class Remembering(Scorer):
    """Remembers the last `memory` tokens, and otherwise prefers small numbers."""

    memory = 10**6

    def log_likelihoods(self, requests):
        for i, (context, tokens) in enumerate(requests):
            number = self.tokenizer.decode(tokens).strip()
            city = (
                self.tokenizer.decode(context).rpartition(" is")[0].rpartition(" ")[2]
            )
            seen = self.tokenizer.decode(context[-self.memory :])
            is_right = f"{city} is {number}" in seen or f"KEY = {number}" in seen
            yield (
                i,
                LogLikelihood(-1.0 if is_right else -2 - int(number) / 1e6, is_right),
            )


def test_a_model_with_memory_finds_what_is_near(sampler):
    scorer = Remembering(sampler)
    for row in needle.measure(scorer, TEXT, SETTINGS):
        assert row["accuracy"] == row["generated"] == 1.0 and row["gain"] > 1
        assert row["nats"] > 0 and row["samples"] == 4 and row["chance"] == 0.25
        assert row["distance"] == row["windows"] * 40
    scorer.memory = 80
    for row in needle.measure(scorer, TEXT, SETTINGS):
        near = row["windows"] < 1
        assert row["accuracy"] == (1.0 if near else 0.25)
        assert row["generated"] == float(near)
        assert (row["gain"] > 1) if near else row["gain"] == pytest.approx(0, abs=1e-9)


def test_figures_are_those_of_plain_scores(sampler):
    """And what is before the needle is read once for all numbers."""
    settings = NeedleSettings(
        kinds=("passkey",),
        lengths=(400,),
        distances=(1,),
        samples=2,
        choices=2,
        window=40,
    )
    scorer = Scorer(sampler, batch_size=2)
    [row] = needle.measure(scorer, TEXT, settings)
    gains, nats = [], []
    for prompt in needle.prompts(sampler.tokenizer, "passkey", "", 400, 40, settings):
        found = [
            np.sum(sampler.score([*prompt.tokens, *answer]).log_probs[399:])
            for answer in prompt.answers
        ]
        gains.append(found[0] - found[1])
        nats.append(-found[0] / len(prompt.answers[0]))
    assert row["gain"] == pytest.approx(np.mean(gains), abs=1e-4)
    assert row["nats"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert row["accuracy"] == np.mean(np.array(gains) > 0)
    assert scorer.tokens_read < 400 + 2 * 150
    assert isinstance(Continuation([1], [2]), tuple)


def test_mistakes_are_told():
    for name, value in (
        ("kinds", ("haystack",)),
        ("kinds", ()),
        ("lengths", (0,)),
        ("distances", (-1,)),
        ("samples", 0),
        ("choices", 1),
        ("window", 0),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            NeedleSettings(**{name: value})
