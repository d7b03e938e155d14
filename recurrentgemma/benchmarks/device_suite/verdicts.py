"""What the rows of the device suite say: a verdict for each default, and a table."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from recurrentgemma.benchmarks.device_suite.pieces import (
    COPY,
    DEFAULT,
    DONE,
    NOT_HERE,
    RIGHT,
)
from recurrentgemma.benchmarks.report import Row

NOISE = 0.05
"""Share of its time by which a default may be slower than another implementation."""
LEAST_WHOLE = 1000
"""Smallest number that the page shows without digits after the point."""
KEEP, CHANGE, UNKNOWN = "keep", "change", "unknown"


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """A row for each program that was timed by default, in its order.

    An implementation counts if it is right: the checks of its op in the dtype were run,
    and those that it takes succeeded.

    Args:
      rows: of the report.

    Returns:
      Rows with `program`, `dtype`, `chosen`, `ms`, `bandwidth_share`, `fastest`,
      `fastest_ms`, `verdict` and its `reason`.
    """
    timed = [row for row in rows if row["kind"] == "time" and row["program"] != COPY]
    found = []
    for default in timed:
        if default["implementation"] != DEFAULT:
            continue
        key = default["program"], default["dtype"]
        named = {
            row["implementation"]: row["measured_ms"]
            for row in timed
            if (row["program"], row["dtype"]) == key
            and row["implementation"] != DEFAULT
            and row["status"] == DONE
            and _is_right(rows, row["check"], row["implementation"], row["dtype"])
        }
        found.append(
            dict(zip(("program", "dtype"), key, strict=True))
            | _figures(default, _copy_bandwidth(rows))
            | _verdict(rows, default, named)
        )
    return found


def _figures(default: Row, bandwidth: float | None) -> Row:
    if default["status"] != DONE:
        return {"chosen": None, "ms": None, "bandwidth_share": None}
    share = default["bytes_per_s"] / bandwidth if bandwidth else None
    chosen, ms = default["chosen"], default["measured_ms"]
    return {"chosen": chosen, "ms": ms, "bandwidth_share": share}


def _verdict(rows: Sequence[Row], default: Row, named: dict[str, float]) -> Row:
    fastest = min(named, key=lambda name: named[name], default=None)
    row: Row = {"fastest": fastest, "fastest_ms": named.get(fastest or "")}
    if default["status"] != DONE:
        reason = f"the default has no time: {default['status']}"
        return row | {"verdict": CHANGE if fastest else UNKNOWN, "reason": reason}
    ran = default["check"], DEFAULT, default["dtype"]
    if not _was_checked(rows, *ran):
        return row | {"verdict": UNKNOWN, "reason": "the default was not checked"}
    if not _is_right(rows, *ran):
        return row | {"verdict": CHANGE, "reason": "the default is wrong"}
    if fastest is None:
        return row | {"verdict": KEEP, "reason": "nothing else is right and timed"}
    # By default and by its name the same program was timed, twice.
    chosen_ms = named.get(default["chosen"], default["measured_ms"])
    ratio = min(chosen_ms, default["measured_ms"]) / named[fastest]
    if ratio * (1 - NOISE) > 1:
        reason = f"{fastest} is {ratio:.2f} times as fast"
        return row | {"verdict": CHANGE, "reason": reason}
    return row | {"verdict": KEEP, "reason": "nothing is faster"}


def _checks(rows: Iterable[Row], op: str, name: str, dtype: str) -> list[str]:
    """How the checks of an op ended that an implementation takes."""
    return [
        row["status"]
        for row in rows
        if row["kind"] == "check"
        and row["program"].split(":")[0] == op
        and (row["implementation"], row["dtype"]) == (name, dtype)
        and row["status"] != NOT_HERE
    ]


def _was_checked(rows: Iterable[Row], op: str, name: str, dtype: str) -> bool:
    return bool(_checks(rows, op, name, dtype))


def _is_right(rows: Iterable[Row], op: str, name: str, dtype: str) -> bool:
    found = _checks(rows, op, name, dtype)
    return bool(found) and set(found) == {RIGHT}


def _copy_bandwidth(rows: Iterable[Row]) -> float | None:
    copies = (row for row in rows if row["program"] == COPY)
    return next((row.get("bytes_per_s") for row in copies), None)


def markdown(facts: Row, rows: Sequence[Row], found: Sequence[Row], left: int) -> str:
    """The page for the README: where, ops, models, and what is not as it should be.

    Args:
      facts: of the document.
      rows: of the document.
      found: what `verdicts` returned.
      left: number of pieces that were not run.
    """
    versions = facts["versions"] | {"commit": facts["commit"]}
    versions = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    bandwidth = _copy_bandwidth(rows)
    copy = f"; copies {bandwidth / 1e9:.4g} GB/s" if bandwidth else ""
    lines = [f"{facts['device']}, {versions}; size {facts['size']}{copy}.", ""]
    lines += _table(
        ("program", "dtype", "default", "ms", "of copies", "fastest", "ms", "verdict"),
        [
            (
                *(row["program"], row["dtype"], row["chosen"], _number(row["ms"])),
                _percent(row["bandwidth_share"]),
                *(row["fastest"], _number(row["fastest_ms"])),
                f"{row['verdict']}: {row['reason']}",
            )
            for row in found
        ],
    )
    models = [row for row in rows if row["kind"] == "model" and row["status"] == DONE]
    lines += _table(
        ("model", "dtype", "tokens/s", "of the limit", "compilation, s"),
        [
            (
                *(row["program"], row["dtype"], _number(row["tokens_per_s"])),
                _percent(row.get("share_of_ceiling")),
                _number(row.get("compile_s")),
            )
            for row in models
        ],
    )
    return "\n".join([*lines, *_rest(rows, left)]) + "\n"


def _rest(rows: Sequence[Row], left: int) -> list[str]:
    counts = Counter(row["status"] for row in rows if row["kind"] == "check")
    ends = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [f"Checks: {ends or 'none'}."]
    for row in rows:
        if row["status"] not in (RIGHT, DONE, NOT_HERE):
            name = f"{row['program']}: {row['implementation']}, {row['dtype']}"
            lines.append(f"- {row['kind']} {name}: {row['status']}, {row['remark']}")
    if left:
        lines += ["", f"{left} pieces are left; the same command goes on."]
    return lines


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    cells = [[("-" if c is None else str(c)) for c in row] for row in rows]
    lines = [titles, ["---"] * len(titles), *cells]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:,.0f}" if value >= LEAST_WHOLE else f"{value:.4g}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"
