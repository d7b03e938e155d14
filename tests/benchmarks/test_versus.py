"""The comparison end to end, on a tiny model and without the other packages."""

import dataclasses
import json
import shutil
import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from recurrentgemma.benchmarks import agreement, paired, versus
from recurrentgemma.benchmarks.measures import Plan, compilations
from recurrentgemma.benchmarks.models import SMALL_PRESETS
from recurrentgemma.benchmarks.opponents import checkpoint, worker
from recurrentgemma.benchmarks.opponents.worker import Worker, WorkerError
from recurrentgemma.benchmarks.paired import Disagreement
from recurrentgemma.checkpoints import load

CONFIG = dataclasses.replace(
    versus.CONFIG,
    vocab_size=64,
    width=32,
    mlp_width=48,
    num_layers=3,
    num_heads=2,
    head_dim=16,
    lru_width=32,
    num_gate_blocks=2,
    attention_window=16,
    embedding_scale=5.65625,
)
PLAN = Plan(
    prefill_lengths=(16, 32),
    decode_batches=(1,),
    prompt=5,
    new_tokens=4,
    train_length=16,
    first_call_prompts=(6,),
    check_lengths=(8, 24),
    rounds_of_compilation=1,
)
SUBJECTS = {
    "tiny": versus.Subject(CONFIG, PLAN, window=16),
    "gemma": versus.Subject(
        dataclasses.replace(
            SMALL_PRESETS["gemma2-100m"],
            vocab_size=64,
            width=32,
            mlp_width=48,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            attention_window=20,
            lru_width=32,
            embedding_scale=32**0.5,
        ),
        dataclasses.replace(
            PLAN, train_length=None, first_call_prompts=(), rounds_of_compilation=0
        ),
        ("transformers",),
    ),
}
ROUNDS = 2


class FakeWorker:
    """Answers every command with what a function of the command's name says."""

    def __init__(self, name, answer, log=None):
        self.name, self.answer, self.log = name, answer, log if log is not None else []
        self.peak_bytes = 10

    def ask(self, command, **arguments):
        self.log.append((self.name, command))
        return self.answer(command)


def values_of(*arguments):
    values = flags.FlagValues()
    versus.define_flags(values)
    values(["versus", *arguments])
    return values.flag_values_dict()


def run(tmp_path, *arguments):
    arguments = "--models=tiny,gemma", f"--repeats={ROUNDS}", *arguments
    versus.run(values_of(*arguments), tmp_path, SUBJECTS)
    return json.loads((tmp_path / "versus.json").read_text())


def test_everything_runs_with_our_worker_alone(tmp_path, monkeypatch, capsys):
    # Quick compilation, as in all tests.
    monkeypatch.setattr(worker, "NOT_INHERITED", ("PYTHONPATH",))
    document = run(tmp_path, "--only=decode,prefill,first,train")
    rows = document["rows"]
    common = ["decode, batch 1", "prefill 16", "prefill 32"]
    assert [(row["model"], row["name"]) for row in rows] == [
        *(("tiny", name) for name in common),
        ("tiny", "first call, new prompt length"),
        ("tiny", "train step 16"),
        *(("gemma", name) for name in common),
    ]
    for row in rows:
        assert len(row["samples"]["ours"]) in (1, ROUNDS)  # first calls: 1
        assert row["peak_bytes"]["ours"] > 0
    has_limit = [row.get("limit") is not None for row in rows]
    assert has_limit == [True, True, True, False, True, True, True, True]
    assert list(document["models"]) == ["tiny", "gemma"]
    for facts in document["models"].values():
        assert facts["worker_versions"]["ours"]["jax"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_who_takes_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(versus, "Worker", lambda *arguments: arguments)
    given = [f"--official-python={sys.executable}", "--before=old"]
    values = values_of(*given)
    ours = ("ours", sys.executable, tmp_path)
    before = ("before", sys.executable, tmp_path, Path("old"))
    official = ("official", sys.executable, tmp_path)
    workers = versus._workers(values, tmp_path, versus.OTHERS)
    assert workers == [ours, before, official]
    assert versus._workers(values, tmp_path, ("transformers",)) == [ours, before]
    assert versus._python(values, "transformers") is None
    assert capsys.readouterr().err.startswith("transformers is left out")


def test_another_checkout_runs_its_own_files(tmp_path):
    folder = tmp_path / "old" / worker.HERE.relative_to(worker.ROOT)
    folder.mkdir(parents=True)
    shutil.copy(worker.HERE / "serve.py", folder)
    (folder / "ours.py").write_text(
        "class Opponent:\n"
        "    def __init__(self, directory): pass\n"
        "    def age(self): return 'old'\n"
    )
    arguments = ("before", sys.executable, tmp_path, tmp_path / "old")
    with closing(Worker(*arguments)) as before:
        assert before.ask("age") == "old"
        first = before._process.pid
        before.restart()
        assert before.ask("age") == "old"
        assert before._process.pid != first


def test_both_layouts_hold_the_same_values(tmp_path):
    checkpoint.write(tmp_path, CONFIG)
    models = [load(tmp_path / name)[0] for name in ("official_flax", "hugging_face")]
    for one, other in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.all(np.asarray(one) != 0)
    assert models[0].config == models[1].config == CONFIG


def test_opponents_that_are_not_there(tmp_path):
    values = values_of("--official-python=/no/such/python")
    with pytest.raises(ValueError, match="expected a Python interpreter, got /no/such"):
        versus.run(values, tmp_path)
    with pytest.raises(ValueError, match="--models: expected .*, got 'gpt'"):
        versus.run(values_of("--models=gpt"), tmp_path)
    with pytest.raises(ValueError, match="--only: expected .*decode, batch 1, .*'fly'"):
        versus.run(values_of("--only=fly"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_gemma_is_written_for_transformers_alone(tmp_path):
    config = SUBJECTS["gemma"].config
    checkpoint.write(tmp_path, config)
    assert not (tmp_path / "official_flax").exists()
    assert load(tmp_path / "hugging_face")[0].config == config


def test_compilation_is_what_a_new_process_takes_longer_at_first():
    class Compiling(FakeWorker):
        def restart(self):
            self.compiled = set()

    def answer(command):
        seconds = 1.0 if command in ours.compiled else 3.5
        ours.compiled.add(command)
        return {"seconds": seconds}

    ours = Compiling("ours", answer)
    plan = dataclasses.replace(PLAN, rounds_of_compilation=2)
    rows = [paired.compare(measure, [ours]) for measure in compilations(plan)]
    samples = {row["name"]: row["samples"]["ours"] for row in rows}
    assert samples == {
        "compile train step": [2.5, 2.5],
        "compile forward and decode": [5.0, 5.0],
    }


def test_ratios_are_formed_within_rounds_taken_in_turn():
    log = []
    workers = [
        FakeWorker(name, lambda _, value=value: value, log)
        for name, value in (("ours", 1.0), ("official", 3.0))
    ]
    measure = paired.Measure(
        "wait", "s", higher_is_better=False, sample=lambda w, _: w.ask("x"), rounds=2
    )
    row = paired.compare(measure, workers)
    names = [name for name, _ in log]
    assert names == ["ours", "official", "ours", "official", "official", "ours"]
    assert row["median"] == {"ours": 1.0, "official": 3.0}
    assert row["advantage"] == {"official": 3.0}


ANSWERS = {"generate": {"tokens": [[5, 6]]}, "train": {"loss": 3.0}}
OTHER_ANSWERS = {"generate": {"tokens": [[5, 7]]}, "train": {"loss": 3.001}}
CHECKS = {
    "logits": "logits 8: ours and official differ by 0.01",
    "generate": "greedy tokens: ours and official differ by 1",
    "train": "loss 16, first step: ours and official differ by 0.001",
}


@pytest.mark.parametrize("wrong", [None, *CHECKS])
def test_whatever_differs_stops_the_comparison(wrong, tmp_path):
    for offset in (0.0, 1e-5, 0.01):
        logits = np.zeros((8, 4), np.float32) + np.float32(offset)
        np.save(tmp_path / f"{offset}.npy", logits)

    def ours(command):
        return ANSWERS.get(command, str(tmp_path / "0.0.npy"))

    def theirs(command):
        if command == wrong:
            return OTHER_ANSWERS.get(command, str(tmp_path / "0.01.npy"))
        return ANSWERS.get(command, str(tmp_path / "1e-05.npy"))

    workers = [FakeWorker("ours", ours), FakeWorker("official", theirs)]
    if wrong:
        with pytest.raises(Disagreement, match=CHECKS[wrong]):
            agreement.check(workers, PLAN, window=16)
        return
    findings = agreement.check(workers, PLAN, window=16)
    assert {f["opponent"] for f in findings} == {"official"}
    assert len(findings) == 2 + 1 + 2


def test_without_training_only_logits_and_tokens_are_compared():
    workers = [FakeWorker("ours", ANSWERS.get), FakeWorker("transformers", ANSWERS.get)]
    plan = dataclasses.replace(PLAN, check_lengths=(), train_length=None)
    [finding] = agreement.check(workers, plan, window=None)
    assert finding["what"] == "greedy tokens"


def test_transformers_is_compared_within_its_window():
    workers = [FakeWorker("ours", ANSWERS.get), FakeWorker("transformers", ANSWERS.get)]
    plan = dataclasses.replace(PLAN, check_lengths=(), train_length=32)
    findings = agreement.check(workers, plan, window=16)
    names = ["greedy tokens", "loss 16, first step", "loss 16, second step"]
    assert [finding["what"] for finding in findings] == names
    nan = FakeWorker("transformers", lambda _: {"loss": float("nan")})
    with pytest.raises(Disagreement, match="differ by nan"):
        agreement.check([workers[0], nan], plan, window=16)


def test_a_failing_command_and_a_dead_worker_say_why(tmp_path):
    checkpoint.write(tmp_path, CONFIG)
    with closing(Worker("ours", sys.executable, tmp_path)) as ours:
        fails = pytest.raises(WorkerError, match="ours fly.*AttributeError")
        with fails:
            ours.ask("fly")
    (tmp_path / "tokens.npy").unlink()
    with closing(Worker("ours", sys.executable, tmp_path)) as ours:
        dies = pytest.raises(WorkerError, match="tokens.npy")
        with dies:
            ours.ask("versions")
