"""The device check, on this CPU."""

import json

import jax
import jax.numpy as jnp
import pytest

from recurrentgemma import cli
from recurrentgemma.benchmarks import device, scan, scan_programs
from recurrentgemma.kernels.linear_scan.workloads import Workload

TINY = Workload(1, 16, 128)
NAMES = ["rg_lru: composed", "linear_scan gradient: chunked"]


@pytest.fixture
def few_programs(monkeypatch):
    monkeypatch.setitem(scan.WORKLOADS, "train_small", TINY)
    monkeypatch.setattr(scan, "programs", lambda *_: NAMES)
    monkeypatch.setattr(device, "SAMPLE_S", 1e-4)
    monkeypatch.setattr(scan, "CHECKED", (Workload(1, 20, 128),))


def measured(tmp_path, *arguments):
    """The document of a run."""
    command = ["bench", "scan", "--workloads=train_small", "--out", str(tmp_path)]
    assert cli.main([*command, *arguments]) == 0
    return json.loads((tmp_path / "scan.json").read_text())


@pytest.mark.slow
def test_table(tmp_path, few_programs):
    document = measured(tmp_path)
    assert len(document["rows"]) == len(NAMES) * len(scan_programs.DTYPES)
    bandwidth = max(document["copy_bytes_per_s"].values())
    for row in document["rows"]:
        assert 0 < row["rms_error"] < scan.TOLERANCES[row["dtype"]]
        assert len(row["samples_ms"]) == device.SAMPLES
        seconds = row["measured_ms"] / 1e3
        assert row["bytes_per_s"] == pytest.approx(row["least_bytes"] / seconds)
        assert row["bandwidth_share"] == pytest.approx(row["bytes_per_s"] / bandwidth)


def test_a_wrong_program_is_not_timed(tmp_path, few_programs, monkeypatch):
    def wrong(x, *others, implementation):
        y, last = op.function(x, *others, implementation=implementation)
        return (y * 1.001 if implementation == "composed" else y), last

    op = scan_programs.OPS["rg_lru"]
    monkeypatch.setitem(scan.OPS, "rg_lru", op._replace(function=wrong))
    scan.check.cache_clear()
    rows = measured(tmp_path)["rows"]
    scan.check.cache_clear()
    row = rows[0]
    assert (row["program"], row["remark"]) == (NAMES[0], "WRONG, not timed")
    assert row["rms_error"] == pytest.approx(1e-3, rel=0.01)
    assert "measured_ms" not in row
    assert "measured_ms" in rows[1]


@pytest.mark.slow
def test_what_cannot_run_says_why(tmp_path, few_programs, monkeypatch):
    monkeypatch.setattr(device, "memory_bytes", lambda: 2**30)
    monkeypatch.setitem(scan.WORKLOADS, "train_small", Workload(8, 131072, 2560))
    rows = measured(tmp_path)["rows"]
    assert all(row["remark"].startswith("does not fit: ") for row in rows)

    monkeypatch.setattr(scan, "programs", lambda *_: ["rg_lru: chunked"])
    rows = measured(tmp_path)["rows"]
    assert all("NotImplementedError" in row["remark"] for row in rows)


def test_a_budget_is_kept(tmp_path, few_programs):
    rows = measured(tmp_path, "--seconds", "0")["rows"]
    assert all(row["remark"].startswith("left out") for row in rows)


def test_an_unknown_workload_is_one_line(tmp_path, capsys):
    command = ["bench", "scan", "--workloads=huge", "--out", str(tmp_path)]
    assert cli.main(command) == 1
    assert "workloads: expected one of prefill_67m," in capsys.readouterr().err


def test_random_arguments_keep_their_order_and_ranges():
    arguments = scan_programs.random_arguments("rg_lru", TINY, "bfloat16", seed=1)
    assert list(arguments) == list(scan_programs.OPS["rg_lru"].shapes(TINY, "f4"))
    assert -6 <= jnp.min(arguments["a_param"]) < jnp.max(arguments["a_param"]) <= -3
    assert not jnp.array_equal(arguments["x"], arguments["input_logits"])
    other = scan_programs.random_arguments("rg_lru", TINY, "bfloat16", seed=2)
    assert not jnp.array_equal(arguments["x"], other["x"])
    assert jax.tree.leaves(arguments)[0].dtype in ("float32", "bfloat16")
