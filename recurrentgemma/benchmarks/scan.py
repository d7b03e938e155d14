"""The recurrence's kernels: what they must move, what is expected of them, their time.

    python -m recurrentgemma.benchmarks.scan

On a machine with a TPU or a GPU this measures, within a few minutes: see
`scan_measured`. Elsewhere the real TPU compiler (extra `tpu-plan`) is asked. For each
program, workload and TPU generation: the least bytes (every argument read once, every
result written once), the time these take at the published bandwidth (roofline), the
bytes that the blocks of its kernel transfer, the compiler's cycles, the use of its slots
by unit, over all bundles that it issues (printed: the unit that is fullest), and the
estimated time, the longer one of cycles / clock and bytes / bandwidth. These are
estimates: they rank programs and scale with size.

`--official DIRECTORY`, which holds the official package `recurrentgemma`, adds its scan,
compiled the same way in a process of its own. `--model` adds whole programs of the 2B
model, with the kernels and without: see `scan_model`. A run that was cut short goes on
where it was, and what has not changed since the last run is not estimated again.
`--quick` takes the bundles that a kernel issues for its cycles: within 6 % of the profile
where arithmetic decides, half of it where memory does, and with it the bytes.
"""

import argparse
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax

from recurrentgemma.benchmarks import ahead_of_time, scan_measured, scan_model
from recurrentgemma.benchmarks.block_traffic import block_bytes
from recurrentgemma.benchmarks.scan_programs import (
    DTYPES,
    PROGRAMS,
    least_bytes,
    programs,
)
from recurrentgemma.benchmarks.scan_table import Column, Document, Row
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results" / "scan.json"
OFFICIAL = Path(__file__).parent / "opponents" / "official_scan.py"
PROFILED = ("prefill_2b", "train_2b")
"""Workloads whose cycles are taken: the profiler needs half a minute for a program."""
WITHOUT_CYCLES = ("associative", "composed", "official")
"""Implementations of hundreds of small kernels, or with relayout copies: the profiler
takes many minutes for them, or refuses. Their estimate is that of their bytes alone."""
OFFICIAL_PROGRAMS = {
    "linear_scan: official": "scan",
    "linear_scan and gradient: official": "scan_and_gradient",
    "rg_lru: official": "gates_and_scan",
    "rg_lru and gradient: official": "gates_and_scan_and_gradient",
}
COLUMNS = (
    Column("least MB", "least_bytes", 1e-6),
    Column("moved MB", "moved_bytes", 1e-6),
    Column("roofline ms", "roofline_ms"),
    Column("cycles/1000", "cycles", 1e-3),
    Column("spills", "spills"),
    Column("estimate ms", "estimated_ms"),
)
PRINT_BYTES = "print(compiled.cost_analysis().get('bytes accessed', 0))\n"


def program_code(generation: str, program: str, workload: str, dtype: str) -> str:
    """Python that compiles one of our programs and prints the bytes that it moves."""
    return (
        "from recurrentgemma.benchmarks import ahead_of_time, scan\n"
        f"workload = scan.WORKLOADS[{workload!r}]\n"
        f"function, shapes = scan.PROGRAMS[{program!r}](workload, {dtype!r})\n"
        "compiled = ahead_of_time.compile_for("
        f"{generation!r}, function, *shapes)\n"
        f"{PRINT_BYTES}"
    )


def official_code(generation: str, program: str, workload: str, dtype: str) -> str:
    """The same of a program around the official scan."""
    topology = ahead_of_time.CHIPS[generation].topology
    arguments = (topology, OFFICIAL_PROGRAMS[program], *WORKLOADS[workload], dtype)
    return f"{OFFICIAL.read_text()}\ncompiled = compile_for{arguments!r}\n{PRINT_BYTES}"


def ours(name: str, workload: str, dtype: str) -> Row:
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


def estimate(
    run: Callable[..., ahead_of_time.Profile], row: Row, *, quick: bool
) -> Row:
    """What the compiler says of one program for one chip.

    Args:
      run: `ahead_of_time.profile` of the program.
      row: of the program, with its generation; `moved_bytes` if they are known.
      quick: whether to take the bundles that are issued for the cycles.
    """
    chip = ahead_of_time.CHIPS[row["generation"]]
    if "moved_bytes" not in row:  # alone: under the profiler it does not say
        row = row | {"moved_bytes": float(run(cycles=False).output)}
    seconds = row["moved_bytes"] / chip.bytes_per_s
    if row["program"].endswith(WITHOUT_CYCLES):
        return row | {"estimated_ms": 1e3 * seconds, "remark": "bytes alone"}
    try:
        profile = run(cycles=not quick)
    except RuntimeError as error:
        reason = re.search(f"{ahead_of_time.PROFILER_REFUSES}.*", str(error))
        if not reason:
            raise
        row = row | {"profile_refused": reason[0]}
        profile = run(cycles=False)
    issued = profile.issued or {"bundles": 0, "slots_filled": {"none": 0.0}}
    cycles = sum(profile.cycles.values()) or issued["bundles"]
    filled = issued["slots_filled"]
    busiest = max(filled, key=filled.__getitem__)
    remark = f"{busiest} {filled[busiest]:.0%}"
    return row | {
        "cycles": cycles,
        "cycles_by_kernel": profile.cycles,
        "spills": sum(profile.spills.values()),
        "issued": issued,
        "estimated_ms": 1e3 * max(cycles / chip.clock_hz, seconds),
        "remark": remark if profile.cycles else f"{remark}, issued",
    }


def estimates(
    document: Document,
    options: argparse.Namespace,
    official: Path | None,
) -> None:
    """A row for each program, workload, dtype and generation."""
    for workload, dtype, name, row in _programs(options, official):
        for generation in options.generations:
            key = {
                "program": name,
                "workload": workload,
                "dtype": dtype,
                "generation": generation,
            }
            row_here = key | row
            if name in PROGRAMS:
                code, path = program_code(generation, name, workload, dtype), ()
                chip = ahead_of_time.CHIPS[generation]
                row_here["roofline_ms"] = 1e3 * row["least_bytes"] / chip.bytes_per_s
            else:
                code = official_code(generation, name, workload, dtype)
                path = (str(official),)
                row_here["fingerprint"] = ahead_of_time.fingerprint(code)
            fingerprint = row_here["fingerprint"]
            good = {f"{fingerprint} profiled"}
            if workload in options.profiled:
                if options.quick:
                    good.add(f"{fingerprint} issued")
            else:
                good |= {fingerprint, f"{fingerprint} issued"}
            if document.fingerprint(row_here) in good:
                continue
            if workload in options.profiled:
                run = partial(ahead_of_time.profile, code, path=path)
                row_here = estimate(run, row_here, quick=options.quick)
                how = "issued" if options.quick else "profiled"
                row_here["fingerprint"] = f"{fingerprint} {how}"
            document.add(row_here)


def _programs(
    options: argparse.Namespace, official: Path | None
) -> Iterator[tuple[str, str, str, Row]]:
    """Workload, dtype, name and row of each program."""
    left_out = tuple(options.leave_out)
    for workload in options.workloads:
        names = programs("tpu", WORKLOADS[workload])
        if official and workload in options.profiled:
            names += OFFICIAL_PROGRAMS
        for dtype in DTYPES:
            for name in names:
                if not name.endswith(left_out):
                    known = ours(name, workload, dtype) if name in PROGRAMS else {}
                    yield workload, dtype, name, known


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = _options(arguments)
    platform = jax.default_backend()
    if options.measure or platform != "cpu":
        scan_measured.run(
            options.output, RESULTS, options.workloads, budget_s=options.seconds
        )
        return
    if options.workloads is None:
        options.workloads = list(WORKLOADS)
    document = Document(options.output or RESULTS, COLUMNS, resume=True)
    with tempfile.TemporaryDirectory() as directory:
        official = None
        if options.official:  # alone: what else lies beside it must not be imported
            official = Path(directory)
            package = options.official.absolute() / "recurrentgemma"
            os.symlink(package, official / "recurrentgemma")
        estimates(document, options, official)
    if options.model:
        scan_model.estimates(document)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--official", type=Path, help="directory of the package")
    parser.add_argument(
        "--model", action="store_true", help="also whole programs of the 2B model"
    )
    parser.add_argument(
        "--generations",
        nargs="+",
        default=list(ahead_of_time.CHIPS),
        choices=list(ahead_of_time.CHIPS),
    )
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS))
    parser.add_argument(
        "--profiled", nargs="*", default=list(PROFILED), choices=list(WORKLOADS)
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="seconds a program, not minutes: cycles are the bundles that it issues",
    )
    parser.add_argument(
        "--leave-out", nargs="*", default=(), help="programs, by the end of their names"
    )
    parser.add_argument(
        "--measure", action="store_true", help="time the programs, on a CPU too"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=scan_measured.BUDGET_S,
        help="after which no other program is measured",
    )
    parser.add_argument("--output", type=Path, help="the JSON document")
    options = parser.parse_args(arguments)
    needs_compiler = options.profiled or options.model
    if options.measure or jax.default_backend() != "cpu":
        if options.output and options.output.resolve() == RESULTS.resolve():
            parser.error("--output: these are the estimates; measure into another file")
    elif needs_compiler and importlib.util.find_spec("libtpu") is None:
        parser.error(
            "there is no TPU or GPU here, and no TPU compiler for estimates: "
            "pip install 'recurrentgemma[tpu-plan]', or time this CPU with --measure"
        )
    return options


if __name__ == "__main__":
    main()
