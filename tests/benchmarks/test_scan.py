"""The table of the recurrence's estimates: what needs no compiler for TPU."""

import json

import jax
import pytest

from recurrentgemma.benchmarks import ahead_of_time, scan, scan_programs
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
        least = scan_programs.least_bytes(scan.PROGRAMS[program](WORKLOAD, dtype))
        expected = sequences * SEQUENCE * itemsize + states * STATE
        if program.startswith("rg_lru"):
            expected += 2 * 1000 * 4  # positions
            expected += (2 if "gradient" in program else 1) * 256 * 4  # a_param
        assert least == expected


@pytest.mark.parametrize("op", ["linear_scan gradient", "rg_lru gradient"])
def test_block_bytes_count_the_group_before_each_block(op):
    function, shapes = scan.PROGRAMS[f"{op}: pallas_tpu"](WORKLOAD, "float32")
    least = scan_programs.least_bytes((function, shapes))
    more = block_bytes(function, *shapes) - least
    # Whole blocks, the last one beyond the end; groups of 8 steps before each.
    assert 0 < more < 0.2 * least


def test_block_bytes_of_a_forward_kernel_are_the_least_bytes():
    function, shapes = scan.PROGRAMS["linear_scan: pallas_tpu"](
        Workload(2, 1024, 256), "float32"
    )
    least = scan_programs.least_bytes((function, shapes))
    assert block_bytes(function, *shapes) == least


def test_every_program_traces():
    for program in scan.PROGRAMS.values():
        for dtype in scan_programs.DTYPES:
            function, shapes = program(Workload(1, 9, 512), dtype)
            results = jax.tree.leaves(jax.eval_shape(function, *shapes))
            assert results[0].dtype == dtype


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
    output = tmp_path / "scan.json"
    arguments = ["--workloads", "train_small", "--profiled", "--output", str(output)]
    arguments += ["--generations", "v5e", "--leave-out", "pallas_tpu"]
    scan.main(arguments)
    document = json.loads(output.read_text())
    names = scan_programs.programs("tpu", WORKLOADS["train_small"])
    plain = [name for name in names if "pallas" not in name]
    assert len(document["rows"]) == len(plain) * len(scan_programs.DTYPES)
    row = document["rows"][0]
    bandwidth = ahead_of_time.CHIPS["v5e"].bytes_per_s
    assert row["roofline_ms"] == 1e3 * row["least_bytes"] / bandwidth
    assert len(capsys.readouterr().out.splitlines()) == len(document["rows"]) + 1

    # Nothing has changed, and nothing is estimated again.
    scan.main(arguments)
    assert len(capsys.readouterr().out.splitlines()) == 1
    again = json.loads(output.read_text())
    assert again["rows"] == document["rows"]


def test_estimates_need_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(scan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        scan.main([])
    assert "tpu-plan" in capsys.readouterr().err


def test_measurements_do_not_replace_the_estimates(capsys):
    with pytest.raises(SystemExit):
        scan.main(["--measure", "--output", str(scan.RESULTS)])
    assert "measure into another file" in capsys.readouterr().err
