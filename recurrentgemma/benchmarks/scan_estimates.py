"""The recurrence's kernels as the real TPU compiler sees them, without a TPU.

Needs the extra `tpu-plan` (libtpu). For each program, workload, dtype and TPU
generation: the least bytes (every argument read once, every result written once), the
time these take at the published bandwidth (roofline), the bytes that the blocks of its
kernel transfer, the cycles (bundles that it issues), its spills, the use of its slots by
unit (printed: the unit that is fullest), and the estimated time, the longer one of
cycles / clock and bytes / bandwidth. These are estimates: they rank programs and scale
with size. The bundles are within 6 % of the compiler's own estimate of cycles where
arithmetic decides, and half of it where memory does, where the bytes say more.

`--official DIRECTORY`, which holds the official package `recurrentgemma`, adds its scan,
compiled the same way in a separate process. What has not changed since the last run is
not estimated again.
"""

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from recurrentgemma.benchmarks import ahead_of_time
from recurrentgemma.benchmarks.block_traffic import block_bytes
from recurrentgemma.benchmarks.report import Column, Report, Row
from recurrentgemma.benchmarks.scan_programs import (
    DTYPES,
    KEY,
    KEY_COLUMNS,
    PROGRAMS,
    least_bytes,
    programs,
)
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS

OFFICIAL = Path(__file__).parent / "opponents" / "official_scan.py"
COMPILED = ("prefill_2b", "train_2b")
"""Workloads that the compiler is asked about, some seconds each."""
MANY_KERNELS = ("associative", "composed", "official")
"""Implementations of hundreds of small kernels: only the bytes are estimated, of all of
them."""
OFFICIAL_PROGRAMS = {
    "linear_scan: official": "scan",
    "linear_scan and gradient: official": "scan_and_gradient",
    "rg_lru: official": "gates_and_scan",
    "rg_lru and gradient: official": "gates_and_scan_and_gradient",
}
COLUMNS = (
    *KEY_COLUMNS,
    Column("least MB", "least_bytes", 8, 1e-6),
    Column("moved MB", "moved_bytes", 8, 1e-6),
    Column("roofline ms", "roofline_ms", 11),
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


def official_code(generation: str, program: str, workload: str, dtype: str) -> str:
    """The same of a program around the official scan."""
    topology = ahead_of_time.CHIPS[generation].topology
    arguments = (topology, OFFICIAL_PROGRAMS[program], *WORKLOADS[workload], dtype)
    return f"{OFFICIAL.read_text()}\ncompiled = compile_for{arguments!r}\n{PRINT_BYTES}"


def known(name: str, workload: str, dtype: str) -> Row:
    """What is known of one of our programs without a compiler."""
    program = PROGRAMS[name](WORKLOADS[workload], dtype)
    function, shapes = program
    row: Row = {"least_bytes": least_bytes(program)}
    if name.endswith("pallas_tpu"):
        # Not the compiler's: it counts an array twice of which a kernel has two views.
        row["moved_bytes"] = block_bytes(function, *shapes)
    lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    row["fingerprint"] = ahead_of_time.fingerprint(lowered.as_text())
    return row


def estimate(row: Row, code: str, path: tuple[str, ...]) -> Row:
    """What the compiler says of one program for one chip.

    Args:
      row: The row of the program so far; `moved_bytes` if they are known.
      code: Compiles it, and prints the bytes that it moves.
      path: Directories put before the import path of the code.
    """
    chip = ahead_of_time.CHIPS[row["generation"]]
    if row["program"].endswith(MANY_KERNELS):
        moved = float(ahead_of_time.run(code, path=path))
        milliseconds = 1e3 * moved / chip.bytes_per_s
        found = {"moved_bytes": moved, "estimated_ms": milliseconds}
        return row | found | {"remark": "bytes alone"}
    profile = ahead_of_time.profile(code, path=path, cycles=False)
    if profile.issued is None:
        raise RuntimeError(f"{row['program']}: the compiler wrote no bundles")
    filled = profile.issued["slots_filled"]
    busiest = max(filled, key=filled.__getitem__)
    cycles = profile.issued["bundles"]
    seconds = max(cycles / chip.clock_hz, row["moved_bytes"] / chip.bytes_per_s)
    return row | {
        "cycles": cycles,
        "spills": sum(profile.spills.values()),
        "issued": profile.issued,
        "estimated_ms": 1e3 * seconds,
        "remark": f"{busiest} {filled[busiest]:.0%}",
    }


def complete(row: Row, report: Report, *, compiles: bool, official: Path | None) -> Row:
    """The row with its figures, or the report's own if nothing has changed.

    Args:
      row: `KEY`, and what `known` says.
      report: Rows of earlier runs.
      compiles: Whether the compiler is asked.
      official: What to put before the import path for the official package.
    """
    name, workload, dtype, generation = (row[part] for part in KEY)
    if name in PROGRAMS:
        code, path = program_code(generation, name, workload, dtype), ()
        bandwidth = ahead_of_time.CHIPS[generation].bytes_per_s
        row["roofline_ms"] = 1e3 * row["least_bytes"] / bandwidth
    else:
        code, path = official_code(generation, name, workload, dtype), (str(official),)
        row["fingerprint"] = ahead_of_time.fingerprint(code)
    old = report.find(row)
    unchanged = old.get("fingerprint") == row["fingerprint"]
    if unchanged and ("estimated_ms" in old or not compiles):
        return old
    return estimate(row, code, path) if compiles else row


def rows(options: argparse.Namespace, official: Path | None) -> Iterator[Row]:
    """What is known without a compiler of every program, workload and dtype, for each
    generation."""
    for workload in options.workloads:
        names = programs("tpu", WORKLOADS[workload])
        if official and workload in options.compiled:
            names += OFFICIAL_PROGRAMS
        for dtype in DTYPES:
            for name in names:
                if name.endswith(tuple(options.leave_out)):
                    continue
                row = known(name, workload, dtype) if name in PROGRAMS else {}
                for generation in options.generations:
                    key = (name, workload, dtype, generation)
                    yield dict(zip(KEY, key, strict=True)) | row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    names, chips = list(WORKLOADS), list(ahead_of_time.CHIPS)
    parser.add_argument("--official", type=Path, help="directory of the package")
    parser.add_argument("--generations", nargs="+", default=chips, choices=chips)
    parser.add_argument("--workloads", nargs="*", default=names, choices=names)
    parser.add_argument("--compiled", nargs="*", default=COMPILED, choices=names)
    parser.add_argument(
        "--leave-out", nargs="*", default=(), help="programs, by the end of their names"
    )


def run(options: argparse.Namespace) -> None:
    """Estimates what has changed."""
    if options.compiled and importlib.util.find_spec("libtpu") is None:
        raise SystemExit(
            "There is no TPU compiler here: pip install 'recurrentgemma[tpu-plan]'"
        )
    report = Report(options.output, COLUMNS, key=KEY, resume=True)
    with tempfile.TemporaryDirectory() as directory:
        official = None
        if options.official:  # alone: what else lies beside it must not be imported
            official = Path(directory)
            package = options.official.absolute() / "recurrentgemma"
            os.symlink(package, official / "recurrentgemma")
        for row in rows(options, official):
            compiles = row["workload"] in options.compiled
            done = complete(row, report, compiles=compiles, official=official)
            if done is not report.find(row):
                report.add(done)
