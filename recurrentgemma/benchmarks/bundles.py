"""What the TPU compiler writes of a program's machine code, read from its dumps.

The code of a kernel is a list of bundles, one issued a cycle; a bundle has some slots of
each unit. `packed-bundles-post-ra` holds the bundles, where a wait is an empty bundle, and
`hlo-static-per-bundle-utilization` the slots that each of them fills, with the slots that
there are. Both are static: what a cycle of the real machine waits for is not in them.
"""

import re
from pathlib import Path
from typing import Any

PASSES = "(packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization)"
"""A regular expression of the passes to dump."""
UNITS = {
    "VALU": "VALU",
    "VLOAD": "VLOAD",
    "VSTORE": "VSTORE",
    "EUP": "EUP",
    "MXU": "MATMUL",
    "XLU": "XLU",
    "SALU": "SALU",
}
"""Columns by unit: vector arithmetic, loads and stores (fills and spills among them),
transcendentals, matrix products, moves across lanes, scalar arithmetic."""
DELAY_SLOTS = 4
"""Bundles after a jump that are issued before it is taken."""

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)?:[\s>]*\{")
_JUMP = re.compile(r"sbr\.rel.*?target bundleno = (\d+)")
_EXIT_TEST = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test")


def cycles(directory: Path) -> dict[str, int]:
    """Estimated cycles by kernel, from the files of the static profiler."""
    found = {}
    for file in directory.glob("*_static_llo_profile.textproto"):
        match = re.search(r"estimated_cycles: (\d+)", file.read_text())
        if match:
            found[file.name.split("_TPU")[0]] = int(match[1])
    return found


def spills(directory: Path) -> dict[str, int]:
    """Number of instructions that store registers to memory, by kernel."""
    found = {}
    for name, (_, rows) in _utilizations(directory).items():
        found[name] = sum(row["VSTORE:SPILL"] for row in rows)
    return found


def issued(directory: Path) -> dict[str, Any] | None:
    """Slot use of the kernel that issues the most bundles, of a program's kernels.

    A bundle counts as often as the constant turns of the loops around it say, the grid
    among them; what is conditional counts as executed, a loop of unknown length once.

    Returns:
      None if there are no dumps, else a dictionary:
      kernel: Its name.
      bundles: Number of bundles that it issues, a cycle each if nothing waits.
      bundles_using: Share of bundles that use a unit, by unit of `UNITS`.
      slots_filled: Share of a unit's slots that are filled over all bundles, by unit.
    """
    utilizations = _utilizations(directory)
    best: dict[str, Any] | None = None
    for file in directory.glob("*-packed-bundles-post-ra.txt"):
        name = _kernel(file)
        if name in utilizations:
            slots, rows = utilizations[name]
            times = turns_of_bundles(file.read_text())
            if len(times) == len(rows) and (not best or sum(times) > best["bundles"]):
                best = {"kernel": name.split("-", 1)[1], "bundles": sum(times)}
                best |= slot_use(slots, rows, times)
    return best


def turns_of_bundles(text: str) -> list[int]:
    """How often each bundle is issued."""
    bundles: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    loops = [
        range(target, index + 1)
        for index, bundle in enumerate(bundles)
        for target in map(int, _JUMP.findall(bundle))
        if target <= index
    ]
    times = [1] * len(bundles)
    for loop in loops:
        inside = {i for other in loops if len(other) < len(loop) for i in other}
        own = "".join(bundles[i] for i in loop if i not in inside)
        tests = _EXIT_TEST.findall(own)
        if tests:
            for i in range(loop.start, min(loop.stop + DELAY_SLOTS, len(bundles))):
                times[i] *= int(tests[-1])
    return times


def slot_use(
    slots: dict[str, int], rows: list[dict[str, int]], times: list[int]
) -> dict[str, dict[str, float]]:
    """`bundles_using` and `slots_filled` of `issued`."""
    using, filled = {}, {}
    for unit, column in UNITS.items():
        counts = [row[column] for row in rows]
        pairs = list(zip(counts, times, strict=True))
        using[unit] = sum(n for count, n in pairs if count) / sum(times)
        filled[unit] = sum(n * count for count, n in pairs) / (
            sum(times) * slots[column]
        )
    return {"bundles_using": using, "slots_filled": filled}


def _utilizations(
    directory: Path,
) -> dict[str, tuple[dict[str, int], list[dict[str, int]]]]:
    """The slots of each column, and those that each bundle fills, by kernel."""
    found = {}
    for file in directory.glob("*pre-delay_hlo-static-per-bundle-utilization.txt"):
        columns: list[str] = []
        rows = []
        for line in file.read_text().splitlines():
            if "MATMUL" in line:
                columns = [column.strip() for column in line.split(",")]
            elif columns and re.fullmatch(r"\s*\d+(\s+\d+)+\s*", line):
                counts = map(int, line.split())
                rows.append(dict(zip(columns, counts, strict=True)))
        if rows:
            found[_kernel(file)] = rows[0], rows[1:]
    return found


def _kernel(file: Path) -> str:
    """The name of a kernel with its time stamp: two kernels may have one name."""
    return re.sub(r"-\d+-(packed|pre-delay).*$", "", file.name)
