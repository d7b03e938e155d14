"""The recurrence's kernels as the real TPU compiler sees them, without a TPU.

Needs the extra `tpu-plan` (libtpu). For each program, dtype and TPU generation: the
least bytes (every argument read once, every result written once), the bytes that it
moves, and of a single kernel its cycles, its spills and the estimated time: the longer
one of cycles / clock and bytes / bandwidth. These are estimates: they rank programs and
scale with size. Of programs of hundreds of small kernels only the bytes are estimated.

`--official DIRECTORY`, which holds the official package `recurrentgemma`, adds its scan,
compiled the same way in a separate process; jaxtyping and typeguard, which it imports,
must be installed here.
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma._validation import choice
from recurrentgemma.benchmarks import ahead_of_time
from recurrentgemma.benchmarks.report import Column, Report, Row
from recurrentgemma.benchmarks.scan_programs import (
    DTYPES,
    KEY,
    KEY_COLUMNS,
    OPS,
    PROGRAMS,
    block_bytes,
    check_workloads,
    estimated_programs,
    least_bytes,
)
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS

OFFICIAL = Path(__file__).parent / "opponents" / "official_scan.py"
OFFICIAL_OPS = ("linear_scan", "rg_lru")
"""Ops that `OFFICIAL` has, each also with its gradient."""
COMPILED = ("prefill_2b", "train_2b")
COLUMNS = (
    *KEY_COLUMNS,
    Column("least MB", "least_bytes", 8, 1e-6),
    Column("moved MB", "moved_bytes", 8, 1e-6),
    Column("cycles/1000", "cycles", 11, 1e-3),
    Column("spills", "spills", 6),
    Column("estimate ms", "estimated_ms", 11),
)
PRINT_BYTES = "print(compiled.cost_analysis().get('bytes accessed', 0))\n"


def program_code(generation: str, program: str, workload: str, dtype: str) -> str:
    """Python that compiles one of our programs and prints the bytes that it moves."""
    return (
        "from recurrentgemma.benchmarks import ahead_of_time, scan_estimates\n"
        f"workload = scan_estimates.WORKLOADS[{workload!r}]\n"
        f"program = scan_estimates.PROGRAMS[{program!r}]\n"
        f"function, shapes = program(workload, {dtype!r})\n"
        "compiled = ahead_of_time.compile_for("
        f"{generation!r}, function, *shapes)\n"
        f"{PRINT_BYTES}"
    )


def estimate(generation: str, name: str, workload: str, dtype: str) -> Row:
    """What is known of one of our programs, and what the compiler says of it."""
    chip = ahead_of_time.CHIPS[generation]
    code = program_code(generation, name, workload, dtype)
    function, shapes = PROGRAMS[name](WORKLOADS[workload], dtype)
    row: Row = {"least_bytes": least_bytes((function, shapes))}
    if not name.endswith("pallas_tpu"):
        return row | _bytes_alone(chip, code, ())
    # Not the compiler's bytes: it counts an array twice of which a kernel has two views.
    moved = block_bytes(function, *shapes)
    profile = ahead_of_time.profile(code)
    cycles = max(profile.cycles.values())
    seconds = max(cycles / chip.clock_hz, moved / chip.bytes_per_s)
    return row | {
        "moved_bytes": moved,
        "cycles": cycles,
        "spills": sum(profile.spills.values()),
        "estimated_ms": 1e3 * seconds,
    }


def official_estimate(
    generation: str, op: str, workload: str, dtype: str, *, gradient: bool, path: str
) -> Row:
    """The same of a program around the official scan.

    Args:
      generation: A name of `ahead_of_time.CHIPS`.
      op: A name of `OFFICIAL_OPS`.
      workload: A name of `WORKLOADS`.
      dtype: Of the sequences.
      gradient: Whether the program also computes all gradients.
      path: Directory that holds the official package.
    """
    chip = ahead_of_time.CHIPS[generation]
    shapes = OPS[op].shapes(WORKLOADS[workload], dtype).values()
    arguments = [(shape.shape, shape.dtype.name) for shape in shapes]
    call = f"compile_for({chip.topology!r}, {op!r}, {gradient}, {arguments!r})"
    code = f"{OFFICIAL.read_text()}\ncompiled = {call}\n{PRINT_BYTES}"
    return _bytes_alone(chip, code, (path,))


def _bytes_alone(chip: ahead_of_time.Chip, code: str, path: tuple[str, ...]) -> Row:
    moved = float(ahead_of_time.run(code, path=path))
    milliseconds = 1e3 * moved / chip.bytes_per_s
    return {
        "moved_bytes": moved,
        "estimated_ms": milliseconds,
        "remark": "bytes alone",
    }


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    what = "the folder that holds the official package"
    flags.DEFINE_string("official", None, what, flag_values=values)
    for name, default, known in (
        ("generations", list(ahead_of_time.CHIPS), ahead_of_time.CHIPS),
        ("workloads", list(COMPILED), WORKLOADS),
    ):
        what = f"names among {', '.join(known)}"
        flags.DEFINE_list(name, default, what, flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """Estimates every program."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu: expected it to be installed, as it is the TPU compiler, got none; "
            "pip install 'recurrentgemma[tpu-plan]'"
        )
    for generation in values["generations"]:
        choice("generations", generation, ahead_of_time.CHIPS)
    report = Report(folder / "scan_estimates.json", COLUMNS, key=KEY)
    points = [
        (workload, dtype, generation)
        for workload in check_workloads(values["workloads"])
        for dtype in DTYPES
        for generation in values["generations"]
    ]
    with tempfile.TemporaryDirectory() as path:
        official = values["official"]
        if official:  # alone: what else lies beside it must not be imported
            package = Path(official).absolute() / "recurrentgemma"
            os.symlink(package, Path(path) / "recurrentgemma")
        for point in points:
            workload, dtype, generation = point
            for name in estimated_programs(WORKLOADS[workload]):
                key = dict(zip(KEY, (name, *point), strict=True))
                report.add(key | estimate(generation, name, workload, dtype))
            for op in OFFICIAL_OPS if official else ():
                for gradient in (False, True):
                    name = f"{op}{' and gradient' if gradient else ''}: official"
                    key = dict(zip(KEY, (name, *point), strict=True))
                    row = official_estimate(
                        generation, op, workload, dtype, gradient=gradient, path=path
                    )
                    report.add(key | row)
