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
    """Registers stored to memory and loaded again, instructions of the code, by kernel."""
    found = {}
    for name, (_, rows) in _utilizations(directory).items():
        found[name] = sum(row["VSTORE:SPILL"] for row in rows)
    return found


def hot_loop(directory: Path) -> dict[str, Any] | None:
    """Slot use of the loop that issues the most bundles, of all kernels of a program.

    Returns:
      kernel: its name;
      bundles: of one turn of the loop;
      turns: a time that the loop is entered, None if it is no constant;
      bundles_using: by unit of `UNITS`, the share of bundles that use it;
      slots_filled: by unit, the share of its slots, over all bundles.
      None if no kernel has a loop.
    """
    utilizations = _utilizations(directory)
    best: tuple[int, dict[str, Any]] | None = None
    for file in directory.glob("*-packed-bundles-post-ra.txt"):
        name = _kernel(file)
        if name not in utilizations:
            continue
        slots, rows = utilizations[name]
        for first, last, turns in innermost_loops(file.read_text()):
            issued = (last + 1 - first) * (turns or 1)
            if last < len(rows) and (best is None or issued > best[0]):
                body = rows[first : last + 1]
                loop = {
                    "kernel": name.split("-", 1)[1],
                    "bundles": len(body),
                    "turns": turns,
                }
                best = issued, loop | slot_use(slots, body)
    return best[1] if best else None


def innermost_loops(text: str) -> list[tuple[int, int, int | None]]:
    """First and last bundle and turns of every loop that has no loop inside."""
    bundles: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    loops = []
    for index, bundle in enumerate(bundles):
        for target in map(int, _JUMP.findall(bundle)):
            if target <= index:
                tests = _EXIT_TEST.findall("".join(bundles[target : index + 1]))
                turns = int(tests[-1]) if tests else None
                last = min(index + DELAY_SLOTS, len(bundles) - 1)
                loops.append((target, last, turns))
    return [
        loop
        for loop in loops
        if not any(
            other != loop and loop[0] <= other[0] and other[1] <= loop[1]
            for other in loops
        )
    ]


def slot_use(
    slots: dict[str, int], bundles: list[dict[str, int]]
) -> dict[str, dict[str, float]]:
    """`bundles_using` and `slots_filled` of `hot_loop`."""
    using, filled = {}, {}
    for unit, column in UNITS.items():
        counts = [bundle[column] for bundle in bundles]
        using[unit] = sum(count > 0 for count in counts) / len(bundles)
        filled[unit] = sum(counts) / (len(bundles) * slots[column])
    return {"bundles_using": using, "slots_filled": filled}


def _utilizations(
    directory: Path,
) -> dict[str, tuple[dict[str, int], list[dict[str, int]]]]:
    """By kernel: the slots of each column, and those that each bundle fills."""
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
    """With the time stamp that keeps apart two kernels of one name."""
    return re.sub(r"-\d+-(packed|pre-delay).*$", "", file.name)
