"""Runs: they learn, resume bit for bit, and leave nothing half-done."""

import json
import logging
import os
import signal

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import PRESETS, load
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.training import loop, step
from recurrentgemma.training.loop import TrainConfig, train
from recurrentgemma.training.optimizer import OptimizerConfig
from recurrentgemma.training.state import Checkpoints, TrainState
from tests.checkpoints.test_round_trips import TOKENIZER
from tests.models import tiny_config


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A few short documents; the preset `nano` is tiny here, and quick to compile."""
    tiny = tiny_config(vocab_size=4096, num_layers=1, width=16, lru_width=16)
    monkeypatch.setitem(PRESETS, "nano", tiny)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 4)
    return str(folder)


def config_for(corpus, output, **fields):
    defaults = {
        "data": corpus,
        "output": str(output),
        "steps": 6,
        "batch_size": 2,
        "sequence_length": 16,
        "held_out_share": 0.2,
        "evaluate_every": 3,
        "evaluation_batches": 1,
        "checkpoint_every": 2,
    }
    return TrainConfig(**{**defaults, **fields})


def metrics_of(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def parameters_of(folder):
    return named_parameters(load(folder)[0])


@pytest.mark.slow
def test_a_short_run_learns_and_can_be_loaded(corpus, tmp_path):
    model_folder = train(
        config_for(
            corpus,
            tmp_path / "run",
            steps=40,
            optimizer=OptimizerConfig(learning_rate=2e-2),
        )
    )
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert {"step", "loss", "gradient_norm", "learning_rate"} < set(rows[0])
    assert max(row["learning_rate"] for row in rows) == pytest.approx(2e-2)
    assert rows[-1]["held_out_loss"] < rows[2]["held_out_loss"]
    model, tokenizer = load(model_folder)
    hidden, _ = model(jnp.asarray([tokenizer.encode("def ")]))
    assert jnp.isfinite(model.logits(hidden)).all()


def test_a_metric_is_added_in_one_place(corpus, tmp_path, monkeypatch):
    sums = step.batch_sums

    def with_accuracy(model, batch, cache=None):
        hidden, _ = model(batch.tokens, batch.positions, cache)
        hits = model.logits(hidden).argmax(-1) == batch.targets
        found, cache = sums(model, batch, cache)
        return {**found, "accuracy": (hits * batch.mask).sum()}, cache

    monkeypatch.setattr(step, "batch_sums", with_accuracy)
    train(config_for(corpus, tmp_path / "run", steps=3))
    rows = metrics_of(tmp_path / "run")
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert 0 <= rows[-1]["held_out_accuracy"] <= 1


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    corpus, tmp_path, monkeypatch
):
    uninterrupted = train(config_for(corpus, tmp_path / "a"))

    write = loop.MetricsLog.write

    def interrupt_at_step_3(self, row):
        write(self, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    config = config_for(corpus, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsLog, "write", interrupt_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (tmp_path / "b" / "model").exists()
    assert Checkpoints(tmp_path / "b" / "checkpoints").latest_step == 3
    resumed = train(config)

    chex.assert_trees_all_equal(parameters_of(resumed), parameters_of(uninterrupted))
    assert [row["loss"] for row in metrics_of(tmp_path / "b")] == [
        row["loss"] for row in metrics_of(tmp_path / "a")
    ]


def test_a_run_on_one_file_says_that_nothing_is_held_out(corpus, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        train(config_for(f"{corpus}/0.py", tmp_path / "run", steps=1))
    [message] = [m for m in caplog.messages if m.startswith("data:")]
    assert "none of the 1 documents is held out" in message
    assert "held_out_loss" not in metrics_of(tmp_path / "run")[0]


def test_another_config_does_not_resume(corpus, tmp_path):
    loop._claim(tmp_path / "run", config_for(corpus, tmp_path / "run", steps=1))
    with pytest.raises(ValueError, match="batch_size is 2, not 3"):
        train(config_for(corpus, tmp_path / "run", steps=1, batch_size=3))


def test_a_record_from_before_a_field_existed_resumes(corpus, tmp_path):
    config = config_for(corpus, tmp_path / "run", steps=1)
    loop._claim(tmp_path / "run", config)
    path = tmp_path / "run" / "train_config.json"
    record = json.loads(path.read_text())
    del record["seed"], record["optimizer"]["epsilon"]
    path.write_text(json.dumps(record))
    loop._claim(tmp_path / "run", config)
    record["optimizer"]["b1"] = 0.5
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds a run of another config"):
        loop._claim(tmp_path / "run", config)


def test_a_failed_save_names_the_state_that_is_left(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "states")

    def state(step):
        return TrainState({"x": jnp.full([3], step)}, (), jnp.asarray(step))

    checkpoints.save(state(1))

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", disk_full)
    with pytest.raises(OSError, match=r"step 2 .*No space left.* step is 1"):
        checkpoints.save(state(2))
    restored = Checkpoints(tmp_path / "states").restore(state(0))
    assert int(restored.step) == 1
    np.testing.assert_array_equal(restored.params["x"], [1, 1, 1])


def test_a_state_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "states")
    checkpoints.save(TrainState({"x": jnp.ones([3])}, (), jnp.asarray(1)))
    with pytest.raises(ValueError, match="damaged, or of another model"):
        checkpoints.restore(TrainState({"y": jnp.ones([3])}, (), jnp.asarray(1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": -1}, "batch_size"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"model": "nanoo"}, "nano"),
        ({"tokenizer": "missing.model"}, "missing.model"),
        ({"tokenizer": str(TOKENIZER)}, "has 512 pieces"),
        ({"data": "missing"}, "data: "),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    fields, message, corpus, tmp_path
):
    with pytest.raises(ValueError, match=message):
        train(config_for(corpus, tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    make = loop.make_train_step

    def broken(*args):
        run_step = make(*args)

        def run(state, frozen, batch):
            state, metrics = run_step(state, frozen, batch)
            return state, {**metrics, "loss": jnp.nan}

        return run

    monkeypatch.setattr(loop, "make_train_step", broken)
    with pytest.raises(ValueError, match="loss at step 1 is nan"):
        train(config_for(corpus, tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest_step is None
