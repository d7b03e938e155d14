"""The tasks are what they say; a model learns one; runs resume."""

import dataclasses
import json

import numpy as np
import pytest

from recurrentgemma.benchmarks import recall
from recurrentgemma.benchmarks.recall import experiments
from recurrentgemma.benchmarks.recall.tasks import Copying, Induction, Mqar, PhoneBook
from recurrentgemma.benchmarks.recall.training import Learner, Plan, Result

ROWS = 50


def rng():
    return np.random.default_rng(0)


def test_copying_asks_for_the_data_in_order():
    tokens, places, answers = Copying(num_data=5).sample(rng(), ROWS, 20)
    assert tokens.shape == (ROWS, 25)
    for row, where, right in zip(tokens, places, answers, strict=True):
        data = [token for token in row if token >= Copying.FIRST_DATA]
        assert data == right.tolist()
        assert where.tolist() == [20, 21, 22, 23, 24]
        assert set(row[where]) == {Copying.MARKER}
    assert set(answers.ravel()) == set(range(2, 16))


def test_induction_asks_for_what_followed_the_special_token():
    tokens, places, answers = Induction().sample(rng(), ROWS, 12)
    firsts = set()
    for row, [where], [right] in zip(tokens, places, answers, strict=True):
        [first, last] = np.flatnonzero(row == Induction.SPECIAL)
        assert (last, where, row[first + 1]) == (11, 11, right)
        firsts.add(first)
    assert firsts == set(range(10))


def test_mqar_asks_for_the_value_of_every_key_after_all_pairs():
    tokens, places, answers = Mqar(vocab_size=64, num_pairs=4).sample(rng(), ROWS, 40)
    for row, where, right in zip(tokens, places, answers, strict=True):
        pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(pairs) == len(set(where)) == 4
        assert where.min() >= 8
        assert set(row[where]) == set(pairs)
        assert [pairs[key] for key in row[where]] == right.tolist()
        assert max(pairs) < 32 <= min(right)


def test_a_phone_book_asks_for_a_number_digit_by_digit():
    tokens, places, answers = PhoneBook().sample(rng(), ROWS, 6)
    assert tokens.shape[1] == 7 * 6 - 1
    for row, where, right in zip(tokens, places, answers, strict=True):
        book = {tuple(e[:2]): e[2:].tolist() for e in row[:36].reshape(6, 6)}
        assert len(book) == 6
        assert book[tuple(row[36:38])] == right.tolist()
        assert row[where[1:]].tolist() == right[:-1].tolist()
        assert where[0] == 37


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        (Copying(num_data=8), 7, "room for 8 different items, got 7"),
        (Mqar(num_pairs=4), 15, "at least 16 tokens"),
        (Induction(), 2, "at least 3 tokens"),
    ],
)
def test_a_length_that_cannot_hold_the_task(task, length, message):
    with pytest.raises(ValueError, match=f"length: expected {message}"):
        task.sample(rng(), 2, length)


def test_every_experiment_fits_its_models():
    for of_size in experiments.EXPERIMENTS.values():
        for experiment in of_size.values():
            for config in experiment.models.values():
                assert config.vocab_size == experiment.task.vocab_size
                recall.state_bytes(config, 100)
            for length in experiment.plan.lengths:
                experiment.task.sample(rng(), 1, length)


@pytest.fixture
def tiny(monkeypatch):
    """One experiment that a single attention layer learns at once."""
    models = experiments._two_mixers(8, window=8, width=16)
    experiment = experiments.Experiment(
        task=Induction(vocab_size=8),
        plan=Plan(lengths=(4,), steps=300, batch_size=32, evaluate_every=20),
        models={"hawk": models["hawk"]},
        tests=((4, Induction(vocab_size=8)), (6, Induction(vocab_size=8))),
    )
    monkeypatch.setitem(recall.EXPERIMENTS["small"], "induction", experiment)
    return experiment


def test_a_model_learns_and_what_is_measured_is_not_measured_again(
    tiny, tmp_path, monkeypatch, capsys
):
    values = {
        "size": "small",
        "tasks": ["induction"],
        "learning-rates": ["3e-2"],
        "seeds": ["0"],
        "steps": None,
    }
    recall.run(values, tmp_path)
    [row] = json.loads((tmp_path / "recall.json").read_text())["rows"]
    assert row["trained"] > 0.9
    assert row["steps"] <= 300
    assert [test["length"] for test in row["tests"]] == [4, 6]
    assert (tmp_path / "recall_small_induction_300.png").stat().st_size > 1000

    steps = []

    def train(learner, *_):
        steps.append(learner.plan.steps)
        return Result({}, 1, [(1, 0.5)])

    monkeypatch.setattr(Learner, "train", train)
    monkeypatch.setattr(Learner, "accuracy", lambda *_, **__: 0.5)
    recall.run(values, tmp_path)
    assert "induction" in capsys.readouterr().out
    recall.run(values | {"steps": 7}, tmp_path)
    recall.run(values, tmp_path)
    assert steps == [7]  # Fewer steps are another run.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": ["chess"]}, "--tasks: expected one of"),
        ({"learning-rates": ["fast"]}, "--learning-rates: expected a"),
        ({"seeds": ["-1"]}, "--seeds: expected an integer"),
    ],
)
def test_mistakes_are_refused_before_any_work(changed, message, tmp_path):
    values = {"size": "small", "tasks": ["mqar"], "steps": 1}
    values |= {"learning-rates": ["1e-3"], "seeds": ["0"]}
    with pytest.raises(ValueError, match=message):
        recall.run(values | changed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_depends_on_its_seed_alone(tiny):
    plan = dataclasses.replace(tiny.plan, steps=3, evaluate_every=3)
    learner = Learner(tiny.task, tiny.models["hawk"], plan)
    first, again, other = (learner.train(1e-2, seed).params for seed in (0, 0, 1))
    name = "embedder.embedding"
    np.testing.assert_array_equal(first[name], again[name])
    assert np.any(np.asarray(first[name] != other[name]))
