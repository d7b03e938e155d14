"""The table of the recurrence's estimates: what needs no compiler for TPU."""

import json

import jax
import jax.numpy as jnp
import pytest

from recurrentgemma import cli
from recurrentgemma.benchmarks import ahead_of_time, scan_estimates, scan_programs
from recurrentgemma.benchmarks.scan_programs import block_bytes
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


def run(tmp_path, *arguments):
    return cli.main(["bench", "scan_estimates", "--out", str(tmp_path), *arguments])


def test_estimates_need_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scan_estimates.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path) == 1
    assert "tpu-plan" in capsys.readouterr().err


def test_table_from_what_the_compiler_writes(tmp_path, monkeypatch):
    """Kernels by cycles and bytes, other programs by their bytes alone."""
    monkeypatch.setattr(scan_estimates.importlib.util, "find_spec", lambda name: True)
    profile = ahead_of_time.Profile({"a": 10, "b": 3_000_000}, {"a": 2, "b": 1})
    monkeypatch.setattr(ahead_of_time, "profile", lambda *_, **__: profile)
    codes = []

    def compiled(code, path):
        codes.append(code)
        return "1638e6\n"

    monkeypatch.setattr(ahead_of_time, "run", compiled)
    flags = ["--generations=v5e", "--workloads=train_small", f"--official={tmp_path}"]
    assert run(tmp_path, *flags) == 0
    rows = json.loads((tmp_path / "scan_estimates.json").read_text())["rows"]
    ours = scan_programs.estimated_programs(WORKLOADS["train_small"])
    names = {row["program"] for row in rows}
    assert names >= {*ours, "rg_lru: official", "rg_lru and gradient: official"}
    assert len(rows) == len(names) * len(scan_programs.DTYPES)
    by_name = {(row["program"], row["dtype"]): row for row in rows}
    kernel = by_name["linear_scan: pallas_tpu", "float32"]
    assert (kernel["cycles"], kernel["spills"]) == (3_000_000, 3)
    assert kernel["estimated_ms"] == pytest.approx(2.0)  # of cycles: bytes take less
    assert kernel["moved_bytes"] == kernel["least_bytes"]
    for name in ("rg_lru: composed", "rg_lru and gradient: official"):
        row = by_name[name, "float32"]
        assert (row["estimated_ms"], row["remark"]) == (2.0, "bytes alone")
    sequence, state = "((8, 512, 256), 'float32')", "((8, 256), 'float32')"
    call = f"'linear_scan', False, [{sequence}, {sequence}, {state}])"  # x, a and h0
    assert sum(call in code for code in codes) == 1


def test_random_arguments_keep_their_order_and_ranges():
    tiny = Workload(1, 16, 128)
    arguments = scan_programs.random_arguments("rg_lru", tiny, "bfloat16", seed=1)
    assert list(arguments) == list(scan_programs.OPS["rg_lru"].shapes(tiny, "f4"))
    assert -6 <= jnp.min(arguments["a_param"]) < jnp.max(arguments["a_param"]) <= -3
    assert not jnp.array_equal(arguments["x"], arguments["input_logits"])
    other = scan_programs.random_arguments("rg_lru", tiny, "bfloat16", seed=2)
    assert not jnp.array_equal(arguments["x"], other["x"])
    assert jax.tree.leaves(arguments)[0].dtype in ("float32", "bfloat16")
