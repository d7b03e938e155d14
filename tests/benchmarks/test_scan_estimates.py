"""The table of the recurrence's estimates: what needs no compiler for TPU."""

import json

import jax
import pytest

from recurrentgemma.benchmarks import (
    ahead_of_time,
    runner,
    scan_estimates,
    scan_programs,
)
from recurrentgemma.benchmarks.block_traffic import block_bytes
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS, Workload

WORKLOAD = Workload(2, 1000, 256)
SEQUENCE, STATE = 2 * 1000 * 256, 2 * 256 * 4


@pytest.mark.parametrize(
    ("program", "sequences", "states"),
    [
        ("linear_scan: pallas_tpu", 3, 2),
        ("linear_scan gradient: pallas_tpu", 5, 3),
        ("rg_lru: composed", 4, 2),
        ("rg_lru gradient: composed", 8, 3),
    ],
)
def test_least_bytes(program, sequences, states):
    for dtype, itemsize in [("float32", 4), ("bfloat16", 2)]:
        least = scan_programs.least_bytes(
            scan_programs.PROGRAMS[program](WORKLOAD, dtype)
        )
        expected = sequences * SEQUENCE * itemsize + states * STATE
        if program.startswith("rg_lru"):
            expected += 2 * 1000 * 4  # positions
            expected += (2 if "gradient" in program else 1) * 256 * 4  # a_param
        assert least == expected


@pytest.mark.parametrize("op", ["linear_scan gradient", "rg_lru gradient"])
def test_block_bytes_count_the_group_before_each_block(op):
    function, shapes = scan_programs.PROGRAMS[f"{op}: pallas_tpu"](WORKLOAD, "float32")
    least = scan_programs.least_bytes((function, shapes))
    more = block_bytes(function, *shapes) - least
    # Whole blocks, the last one beyond the end; groups of 8 steps before each.
    assert 0 < more < 0.2 * least


def test_block_bytes_of_a_forward_kernel_are_the_least_bytes():
    function, shapes = scan_programs.PROGRAMS["linear_scan: pallas_tpu"](
        Workload(2, 1024, 256), "float32"
    )
    least = scan_programs.least_bytes((function, shapes))
    assert block_bytes(function, *shapes) == least


CUSTOM_CALLS = {
    "pallas_tpu": ("tpu", "custom_call @tpu_custom_call"),
    "pallas_gpu": ("cuda", "xla.gpu.triton"),
}
"""By implementation: its platform, and the call that is its kernel."""


@pytest.mark.parametrize("dtype", scan_programs.DTYPES)
@pytest.mark.parametrize("program", scan_programs.PROGRAMS)
def test_every_program_lowers(program, dtype):
    """A kernel as one, for its own platform: traced alone it is the plain function."""
    op, implementation = scan_programs.split_name(program)
    length = 9 if scan_programs.OPS[op].fits(WORKLOAD) else 1
    workload = Workload(1, length, 512)
    function, shapes = scan_programs.PROGRAMS[program](workload, dtype)
    platform, call = CUSTOM_CALLS.get(implementation, ("cpu", ""))
    traced = jax.jit(function).trace(*shapes)
    lowered = traced.lower(lowering_platforms=(platform,))
    assert jax.tree.leaves(lowered.out_info)[0].dtype == dtype
    text = lowered.as_text()
    assert call in text
    if not call:
        assert not any(kernel in text for _, kernel in CUSTOM_CALLS.values())


def test_each_platform_has_its_programs():
    for platform, plain in [
        ("tpu", "composed"),
        ("gpu", "chunked"),
        ("cpu", "chunked"),
    ]:
        names = scan_programs.programs(platform, WORKLOAD)
        assert f"linear_scan: {plain}" in names or f"rg_lru: {plain}" in names
        kernels = [name for name in names if "pallas" in name]
        assert all(name.endswith(f"pallas_{platform}") for name in kernels)
        assert bool(kernels) == (platform != "cpu")


def test_table_without_a_compiler(tmp_path, capsys):
    output = tmp_path / "estimates.json"
    arguments = ["scan_estimates", "--workloads", "train_small", "--compiled"]
    arguments += ["--generations", "v5e", "--leave-out", "pallas_tpu"]
    arguments += ["--output", str(output)]
    runner.main(arguments)
    document = json.loads(output.read_text())
    names = scan_programs.programs("tpu", WORKLOADS["train_small"])
    plain = [name for name in names if "pallas" not in name]
    assert len(document["rows"]) == len(plain) * len(scan_programs.DTYPES)
    row = document["rows"][0]
    bandwidth = ahead_of_time.CHIPS["v5e"].bytes_per_s
    assert row["roofline_ms"] == 1e3 * row["least_bytes"] / bandwidth
    assert len(capsys.readouterr().out.splitlines()) == len(document["rows"]) + 1

    # Nothing has changed, and nothing is estimated again.
    runner.main(arguments)
    assert len(capsys.readouterr().out.splitlines()) == 1
    again = json.loads(output.read_text())
    assert again["rows"] == document["rows"]


def test_estimates_need_a_compiler(monkeypatch):
    monkeypatch.setattr(scan_estimates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="tpu-plan"):
        runner.main(["scan_estimates"])


def test_estimates_from_what_the_compiler_writes(monkeypatch):
    issued = {"bundles": 3_000_000, "slots_filled": {"VALU": 0.5, "EUP": 0.25}}
    profile = ahead_of_time.Profile({}, {"a": 2, "b": 1}, issued, "")
    monkeypatch.setattr(ahead_of_time, "profile", lambda *_, **__: profile)
    row = {"program": "rg_lru: pallas_tpu", "generation": "v5e", "moved_bytes": 819e6}
    found = scan_estimates.estimate(row, "", ())
    assert (found["cycles"], found["spills"]) == (3_000_000, 3)
    assert found["estimated_ms"] == pytest.approx(2.0)  # of cycles: bytes take 1 ms
    assert found["remark"] == "VALU 50%"
    found = scan_estimates.estimate(row | {"moved_bytes": 4 * 819e6}, "", ())
    assert found["estimated_ms"] == pytest.approx(4.0)

    monkeypatch.setattr(ahead_of_time, "run", lambda *_, **__: "1638e6\n")
    found = scan_estimates.estimate(row | {"program": "rg_lru: composed"}, "", ())
    assert (found["estimated_ms"], found["remark"]) == (2.0, "bytes alone")
    silent = profile._replace(issued=None)
    monkeypatch.setattr(ahead_of_time, "profile", lambda *_, **__: silent)
    with pytest.raises(RuntimeError, match="no bundles"):
        scan_estimates.estimate(row, "", ())
