"""Runs: they learn, resume bit for bit, and leave nothing half-done."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import PRESETS, Tokenizer, load, save
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.training import GuardConfig, WatchConfig, loop, records, step, watch
from recurrentgemma.training.adapters import AdapterConfig
from recurrentgemma.training.config import (
    ComputeConfig,
    TrainConfig,
    claim,
    read_record,
)
from recurrentgemma.training.loop import train
from recurrentgemma.training.mesh import MeshConfig
from recurrentgemma.training.mixture import Mixture
from recurrentgemma.training.optimizer import OptimizerConfig
from recurrentgemma.training.rows import RowsConfig
from recurrentgemma.training.start import BUNDLED_TOKENIZER
from recurrentgemma.training.state import Checkpoints, TrainState
from tests import flags
from tests.checkpoints.test_round_trips import TOKENIZER
from tests.models import random_model
from tests.tolerances import assert_close
from tests.training import killed_runs

TINY = killed_runs.TINY
KILLED = """
import sys
from recurrentgemma import PRESETS
from tests.training import killed_runs as runs
PRESETS["nano"] = runs.TINY
data, output = sys.argv[1:]
config = runs.config_for(data, output, model=None)
assert runs.forked(lambda: runs.killed_while_a_state_is_written(config)) == -9
assert runs.forked(lambda: runs.killed_in_a_line_of_the_log(config)) == -9
assert runs.forked(lambda: runs.train(config)) == 0
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """Runs of the same shapes compile once, as the command's runs do."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def corpus(tmp_path, monkeypatch, request):
    """A few short documents; the preset `nano` is tiny here, and quick to compile."""
    monkeypatch.setitem(PRESETS, "nano", TINY)
    if "watched" not in request.node.name:
        monkeypatch.setattr(watch.Watch, "plot", lambda self: None)  # takes a second
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 4)
    return str(folder)


def config_for(corpus, output, **fields):
    fixed = {"data": corpus, "output": str(output), "model": None}
    return killed_runs.config_for(**fixed | fields)


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


def test_interrupted_and_killed_runs_end_like_an_uninterrupted_one(
    corpus, tmp_path, monkeypatch, compiled_programs
):
    uninterrupted = train(config_for(corpus, tmp_path / "a"))

    write = records.JsonLines.write

    def interrupt_at_step_3(self, row):
        write(self, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    config = config_for(corpus, tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(records.JsonLines, "write", interrupt_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (tmp_path / "b" / "model").exists()
    assert Checkpoints(tmp_path / "b" / "checkpoints").latest_step == 3
    resumed = train(config)

    environment = {
        **os.environ,
        "XLA_FLAGS": flags.quick(),  # numbers depend on them
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_COMPILATION_CACHE_DIR": compiled_programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    subprocess.run(
        [sys.executable, "-c", KILLED, corpus, str(tmp_path / "c")],
        env=environment,
        check=True,
    )
    for name, folder in (("b", resumed), ("c", tmp_path / "c" / "model")):
        chex.assert_trees_all_equal(parameters_of(folder), parameters_of(uninterrupted))
        assert [row["loss"] for row in metrics_of(tmp_path / name)] == [
            row["loss"] for row in metrics_of(tmp_path / "a")
        ]
    assert not list((tmp_path / "c" / "checkpoints").glob("*tmp*"))


def test_a_run_on_one_file_says_that_nothing_is_held_out(corpus, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        train(config_for(f"{corpus}/0.py", tmp_path / "run", steps=1))
    [message] = [m for m in caplog.messages if m.startswith("data:")]
    assert "none of the 1 documents is held out" in message
    assert "held_out_loss" not in metrics_of(tmp_path / "run")[0]

    Path(corpus, "0.py").write_text("another\n")
    with pytest.raises(ValueError, match="expected what the run began with"):
        train(config_for(f"{corpus}/0.py", tmp_path / "run", steps=1))


def test_another_config_does_not_resume(corpus, tmp_path):
    claim(tmp_path / "run", config_for(corpus, tmp_path / "run", steps=1), TINY)
    with pytest.raises(ValueError, match="batch_size is 2, not 3"):
        train(config_for(corpus, tmp_path / "run", steps=1, batch_size=3))


def test_a_record_from_before_a_field_existed_resumes(corpus, tmp_path):
    config = config_for(corpus, tmp_path / "run", steps=1)
    claim(tmp_path / "run", config, TINY)
    path = tmp_path / "run" / "train_config.json"
    record = json.loads(path.read_text())
    del record["seed"], record["optimizer"]["epsilon"]
    # The first records had the name of a preset, and nothing of these.
    del record["architecture"], record["watch"], record["guard"]
    record["model"] = "nano"
    record |= record.pop("data")  # once beside the other fields
    del record["order"]
    path.write_text(json.dumps(record))
    assert TrainConfig(**{"output": config.output, **read_record(path)}) == (
        dataclasses.replace(config, model="nano")
    )
    claim(tmp_path / "run", config, TINY)
    assert json.loads(path.read_text())["seed"] == 0
    record["optimizer"]["b1"] = 0.5
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds a run of another config"):
        claim(tmp_path / "run", config, TINY)


def test_a_failed_save_names_the_state_that_is_left(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "states")

    def state(step):
        return TrainState({"x": jnp.full([3], step)}, (), jnp.asarray(step))

    checkpoints.save(state(1))

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", disk_full)
        with pytest.raises(OSError, match=r"step 2 .*No space left.* step is 1"):
            checkpoints.save(state(2))
    # What a thread finds out later comes from the next call.
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", disk_full)
    with pytest.raises(OSError, match=r"step 2 .*No space left.* step is 1"):
        checkpoints.finish()
    restored = Checkpoints(tmp_path / "states").restore(state(0))
    assert int(restored.step) == 1
    np.testing.assert_array_equal(restored.params["x"], [1, 1, 1])


def test_a_state_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "states")
    state = TrainState({"x": jnp.ones([3])}, (), jnp.asarray(1))
    with pytest.raises(ValueError, match="got None; there are none"):
        checkpoints.restore(state)
    checkpoints.save(state)
    checkpoints.finish()
    with pytest.raises(ValueError, match="damaged, or of another model"):
        checkpoints.restore(TrainState({"y": jnp.ones([3])}, (), jnp.asarray(1)))
    with pytest.raises(ValueError, match="got 2; there are 1"):
        checkpoints.restore(state, 2)


def test_a_damaged_state_says_which_one_is_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path / "states", keep=1, keep_every=2)
    for done in (1, 2, 3, 4, 5):
        checkpoints.save(TrainState({"x": jnp.ones([3])}, (), jnp.asarray(done)))
    checkpoints.finish()
    assert checkpoints.steps == [2, 4, 5]
    for file in (tmp_path / "states" / "5").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    state = TrainState({"x": jnp.ones([3])}, (), jnp.asarray(0))
    with pytest.raises(ValueError, match=r"step 5 .*damaged.*\n*.*step 4, remove .*5"):
        checkpoints.restore(state)


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
        ({"rows": RowsConfig(initial_state="carried")}, "order: expected continuous"),
        ({"freeze": ("mlp",)}, "freeze: expected a pattern"),
        ({"branch_from": "gone"}, "branch_from: expected the directory of a run"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(
    fields, message, corpus, tmp_path
):
    with pytest.raises(ValueError, match=message):
        train(config_for(corpus, tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


def test_a_watched_run(corpus, tmp_path, monkeypatch, capsys):
    """Loaded parameters of which some are trained; texts, histograms, a plot."""
    first = tmp_path / "first"
    model = random_model(TINY)
    save(first, model, Tokenizer(BUNDLED_TOKENIZER))
    config = config_for(
        corpus,
        tmp_path / "run",
        steps=4,
        init_from=str(first),
        freeze=("*.mixer.*", "embedder.*"),
        evaluate_every=2,
        watch=WatchConfig(sample_every=2, sample_prompt="def", sample_tokens=3),
    )
    monkeypatch.delitem(PRESETS, "nano")  # the checkpoint says what is trained
    trained = parameters_of(train(config))
    before = named_parameters(loop.export(model, named_parameters(model)))
    for name, value in before.items():
        same = np.array_equal(trained[name], np.asarray(value, np.float32))
        assert same == ("mixer" in name or "embed" in name), name
    rows = metrics_of(tmp_path / "run")
    assert rows[0]["share_of_peak"] > 0
    by_position = rows[1]["held_out_loss_by_position"]
    assert list(by_position) == ["0", "1", "3", "7", "15"]
    assert min(by_position.values()) < rows[1]["held_out_loss"]
    histogram = rows[1]["memory_tokens_histogram"]["blocks.0"]
    assert sum(histogram.values()) == TINY.lru_width
    samples = records.read_rows(tmp_path / "run" / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [2, 4]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    shown = capsys.readouterr()
    assert "held-out loss" in shown.out and "of peak" in shown.err


def test_a_cool_down_branches_off_a_checkpoint(corpus, tmp_path):
    def wsd(output, **fields):
        settings = OptimizerConfig(schedule="wsd", warmup_steps=0, cooldown_steps=2)
        return config_for(corpus, output, optimizer=settings, **fields)

    trunk = tmp_path / "trunk"
    train(wsd(trunk, steps=6, keep_checkpoints=3))
    branch = wsd(tmp_path / "branch", steps=4, branch_from=f"{trunk}@2")
    train(branch)
    ours, theirs = metrics_of(tmp_path / "branch"), metrics_of(trunk)
    assert [row["step"] for row in ours] == [3, 4]
    highest = OptimizerConfig().learning_rate
    rates = [row["learning_rate"] / highest for row in theirs]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1 - 0.95 * 0.5**0.5])
    assert ours[0]["loss"] == theirs[2]["loss"]
    assert ours[1]["learning_rate"] == pytest.approx(theirs[5]["learning_rate"])
    for wrong, message in (
        ({"steps": 2}, "steps: expected more than the 2"),
        ({"branch_from": f"{trunk}@5"}, "got 5; there are 2, 4, 6"),
        ({"branch_from": str(tmp_path)}, "expected the directory of a run"),
    ):
        config = dataclasses.replace(branch, output=str(tmp_path / "x"), **wrong)
        with pytest.raises(ValueError, match=message):
            train(config)
        assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_options_work_together(corpus, tmp_path):
    """Adapters on stacked layers, carried states, chunks; on a mesh as on one device."""

    def run(name, **fields):
        config = config_for(
            corpus,
            tmp_path / name,
            model=dataclasses.replace(TINY, num_layers=7, width=24, lru_width=24),
            steps=3,
            batch_size=4,
            order="continuous",
            compute=ComputeConfig(stack_layers=True, remat=True),
            rows=RowsConfig(initial_state="carried", chunk_tokens=8),
            adapters=AdapterConfig(adapter_rank=2),
            **fields,
        )
        load(train(config))
        return [row["loss"] for row in metrics_of(tmp_path / name)]

    one = run("one")
    assert len(one) == 3
    mesh = MeshConfig("fsdp=4,tensor=2")
    assert_close(run("mesh", devices=mesh), one, "loss")


def test_a_bad_step_is_skipped_and_recorded(corpus, tmp_path, monkeypatch):
    batch = Mixture.batch

    def broken(self, step):
        found = batch(self, step)
        return found._replace(mask=found.mask * np.nan) if step in (1, 2) else found

    monkeypatch.setattr(Mixture, "batch", broken)
    config = config_for(corpus, tmp_path / "run")
    with pytest.raises(ValueError, match=r"loss at step 2 is nan .*on-bad-step skip"):
        train(config)
    skip = dataclasses.replace(config, guard=GuardConfig(on_bad_step="skip"))
    parameters = parameters_of(train(skip))
    rows = metrics_of(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0, 0, 0]
    assert [row["loss"] is None for row in rows] == [False, True, True, *[False] * 3]
    assert all(np.isfinite(value).all() for value in parameters.values())
    one = dataclasses.replace(
        skip,
        output=f"{config.output}2",
        guard=GuardConfig(on_bad_step="skip", most_skips=1),
    )
    with pytest.raises(ValueError, match="loss at step 3 is nan"):
        train(one)


def test_two_processes_do_not_train_in_one_directory(corpus, tmp_path):
    claim(tmp_path / "run", config_for(corpus, tmp_path / "run"), TINY)
    with (
        loop._only_process(tmp_path / "run"),
        pytest.raises(ValueError, match="another process trains in"),
    ):
        train(config_for(corpus, tmp_path / "run"))
