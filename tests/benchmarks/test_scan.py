"""The table of the recurrence: what needs no compiler for TPU."""

import json

import jax
import pytest

from recurrentgemma.benchmarks import ahead_of_time, scan
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS, Workload

WORKLOAD = Workload(2, 1000, 256)
SEQUENCE, STATE = 2 * 1000 * 256, 2 * 256 * 4


@pytest.mark.parametrize(
    ("program", "sequences", "states"),
    [
        ("linear_scan: pallas_tpu", 3, 2),
        ("linear_scan gradient: pallas_tpu", 5, 3),
        ("rg_lru: composed", 4, 2),
        ("rg_lru gradient: composed", 8, 5),
    ],
)
def test_least_bytes(program, sequences, states):
    for dtype, itemsize in [("float32", 4), ("bfloat16", 2)]:
        least = scan.least_bytes(scan.PROGRAMS[program](WORKLOAD, dtype))
        expected = sequences * SEQUENCE * itemsize + states * STATE
        if program.startswith("rg_lru"):
            expected += 2 * 1000 * 4  # positions
            expected += 0 if "gradient" in program else 256 * 4  # one a_param
        assert least == expected


def test_block_bytes_count_the_group_before_each_block():
    for program, arrays in [("linear_scan gradient", 5), ("rg_lru gradient", 8)]:
        name = f"{program}: pallas_tpu"
        least = scan.least_bytes(scan.PROGRAMS[name](WORKLOAD, "float32"))
        more = scan.block_bytes(name, WORKLOAD, "float32") - least
        blocks = more / (2 * 8 * 256 * 4)
        assert blocks == int(blocks)
        assert 1 <= blocks <= 1000 / 64, arrays


def test_every_program_traces():
    for program in scan.PROGRAMS.values():
        for dtype in scan.DTYPES:
            function, shapes = program(Workload(1, 9, 16), dtype)
            results = jax.tree.leaves(jax.eval_shape(function, *shapes))
            assert any(leaf.shape == (1, 9, 16) for leaf in results)


def test_table_without_a_compiler(tmp_path, capsys):
    output = tmp_path / "scan.json"
    scan.main(["--workloads", "decode_2b", "--profiled", "--output", str(output)])
    document = json.loads(output.read_text())
    assert len(document["rows"]) == len(scan.PROGRAMS) * len(scan.DTYPES)
    row = document["rows"][0]
    bandwidth = ahead_of_time.CHIPS["v5e"].bytes_per_s
    assert row["roofline_ms"] == 1e3 * row["least_bytes"] / bandwidth
    assert len(capsys.readouterr().out.splitlines()) == len(document["rows"]) + 1
    assert "decode_2b" in WORKLOADS
