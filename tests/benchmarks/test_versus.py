"""The comparison end to end, on a tiny model and without the opponents."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from recurrentgemma.benchmarks import agreement, paired, versus
from recurrentgemma.benchmarks.measures import Plan
from recurrentgemma.benchmarks.opponents import checkpoint, worker
from recurrentgemma.benchmarks.opponents.worker import Worker, WorkerError
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
    rounds=2,
)


class FakeWorker:
    """Answers every command after its own time."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, seconds, log
        self.peak_bytes = 10

    def ask(self, command, **arguments):
        self.log.append(self.name)
        return self.seconds


def test_everything_runs_with_our_worker_alone(tmp_path, monkeypatch):
    # Quick compilation, as in all tests.
    monkeypatch.setattr(worker, "NOT_INHERITED", ("PYTHONPATH",))
    pythons = {"ours": sys.executable, "official": None, "transformers": None}
    document = versus.run(pythons, CONFIG, PLAN, tmp_path)

    names = [result["name"] for result in document["results"]]
    assert names == [
        "compile forward and decode",
        "decode, batch 1",
        "prefill 16",
        "prefill 32",
        "first call, new prompt length",
        "train step 16",
    ]
    json.dumps(document)
    for result in document["results"]:
        assert len(result["samples"]["ours"]) in (1, PLAN.rounds)
        assert result["peak_bytes"]["ours"] > 0
    assert set(document["limits"]) == {*names[1:4], names[5]}
    assert document["versions"]["ours"]["jax"]


def test_both_layouts_hold_the_same_values(tmp_path):
    checkpoint.write(tmp_path, CONFIG)
    models = [load(tmp_path / name)[0] for name in ("official_flax", "hugging_face")]
    for one, other in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.all(np.asarray(one) != 0)
    assert models[0].config == models[1].config == CONFIG


def test_absent_opponents_are_left_out_with_a_line(capsys):
    assert versus._found("official", "/no/such/python") is None
    assert versus._found("transformers", None) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "/no/such/python" in lines[0]


def test_ratios_are_formed_within_rounds_taken_in_turn():
    log = []
    workers = [FakeWorker("ours", 1.0, log), FakeWorker("official", 3.0, log)]
    measure = paired.Measure(
        "wait", "s", higher_is_better=False, sample=lambda w, _: w.ask("x"), rounds=2
    )
    result = paired.compare(measure, workers)  # pyright: ignore[reportArgumentType]
    assert log == ["ours", "official", "ours", "official", "official", "ours"]
    assert result.advantage("official") == 3.0
    assert "3 (3.00)" in paired.table([result])


def test_different_logits_stop_the_comparison(tmp_path):
    class Logits:
        def __init__(self, name, offset):
            self.name, self.path = name, str(tmp_path / f"{name}.npy")
            np.save(self.path, np.zeros((8, 4), np.float32) + offset)

        def ask(self, command, length):
            return self.path

    workers = [Logits("ours", 0.0), Logits("official", 1e-5)]
    findings = agreement.check(workers, PLAN, window=16)  # pyright: ignore[reportArgumentType]
    assert [f["opponent"] for f in findings] == ["official", "official"]
    workers[1] = Logits("official", 0.01)
    with pytest.raises(agreement.Disagreement, match="logits 8: ours and official"):
        agreement.check(workers, PLAN, window=16)  # pyright: ignore[reportArgumentType]


def test_a_failing_command_and_a_dead_worker_say_why(tmp_path):
    checkpoint.write(tmp_path, CONFIG)
    with Worker("ours", sys.executable, tmp_path) as ours:
        fails = pytest.raises(WorkerError, match="ours fly.*AttributeError")
        with fails:
            ours.ask("fly")
    (tmp_path / "tokens.npy").unlink()
    with Worker("ours", sys.executable, tmp_path) as ours:
        dies = pytest.raises(WorkerError, match="tokens.npy")
        with dies:
            ours.ask("versions")
