"""The best tokens/s of writing over batch sizes that fit the memory, by length.

Every point is one of `decode`: a batch of rows that have read `length` tokens each. The
best batch size at each length is the throughput of a model there: a small cache leaves
room for more rows. The second part of the picture is the choice at one length between
tokens/s for a user and tokens/s for the device.
"""

from typing import Any

from recurrentgemma.benchmarks import decode
from recurrentgemma.benchmarks.picture import Panel, Point, lines_of, short
from recurrentgemma.benchmarks.report import Row, show
from recurrentgemma.benchmarks.sweep import Sweep


def best(rows: list[Row]) -> list[Row]:
    """The fastest row of each model and length; one that says so if none fits."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row["preset"], row["dtype"], row["length"]
        known = found.setdefault(key, row)
        if (row.get("tokens_per_s") or 0) > (known.get("tokens_per_s") or 0):
            found[key] = row
    return list(found.values())


def summarize(rows: list[Row]) -> dict[str, Any]:
    """The best row of each model and length."""
    chosen = best(rows)
    for row in chosen:
        rate = row.get("tokens_per_s")
        words = (
            f"{rate:,.4g} tokens/s at batch {row['batch']}" if rate else "no row fits"
        )
        show(f"{row['preset']}, {row['length']:,} tokens: {words}")
    return {"best": chosen}


def panels(rows: list[Row]) -> list[Panel]:
    """The best rate by length, and the front at the longest length that all models do."""
    names = ("preset", "dtype")
    lengths = [
        {
            row["length"]
            for row in rows
            if row["preset"] == preset and "samples_s" in row
        }
        for preset in {row["preset"] for row in rows}
    ]
    common = set.intersection(*lengths)
    front: dict[str, list[Point]] = {}
    chosen = [row for row in rows if common and row["length"] == max(common)]
    for name, points in lines_of(chosen, "tokens_per_s", "batch", names).items():
        known = [(x, y) for x, y, _ in points if y is not None]
        front[name] = [Point(rate / batch, rate) for batch, rate in known]
    best_of_all = lines_of(best(rows), "tokens_per_s", names=names)
    found = [Panel("tokens read before", "best tokens/s", best_of_all)]
    if front:
        where = f"tokens/s at {short(max(common))}"
        found.append(Panel(f"{where}, a user", f"{where}, the device", front, False))
    return found


SWEEP = Sweep(
    "throughput",
    decode.measure,
    lengths="1k,2k,4k,8k,16k,32k",
    batches="1,2,4,8,16,32,64,128",
    columns=decode.COLUMNS,
    panels=panels,
    define_more=decode.define_more,
    summarize=summarize,
)
define_flags, run = SWEEP.define_flags, SWEEP.run
