"""Results of several runs over each other, and where one overtakes another.

Takes JSON documents of `prefill`, `decode`, `throughput` or `train`. Every line of a
document (a preset, dtype and batch size; of `throughput` the best batch size) is drawn
into one picture. Two lines of one batch size that have two lengths in common are
compared: the ratio of their tokens/s at the shortest and the longest of them, and the
crossover length, at which the line that was behind overtakes (between two lengths by
straight lines of the logarithms).
"""

import itertools
import math
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma.benchmarks import picture, throughput
from recurrentgemma.benchmarks.report import Column, Report, note, read_document

USAGE = "A.json [B.json ...] [FLAGS]"
COLUMNS = (
    Column("line", "name", 36),
    Column("against", "other", 36),
    Column("batch", "batch", 6),
    Column("from", "shortest", 7),
    Column("ratio", "ratio_at_shortest", 8),
    Column("to", "longest", 7),
    Column("ratio", "ratio_at_longest", 8),
    Column("crossover", "crossover", 12),
)


def define_flags(values: flags.FlagValues) -> None:
    """None besides --out."""


def run(values: dict[str, Any], folder: Path) -> None:
    """Compares every pair of lines.

    Raises:
      ValueError: there is no document, one is damaged, or has no tokens/s by length.
    """
    paths = [Path(argument) for argument in values["arguments"]]
    if not paths:
        raise ValueError("expected results such as bench/decode.json, got none")
    stems = len({path.stem for path in paths}) == len(paths)
    documents = {
        path.stem if stems else str(path): read_document(path) for path in paths
    }
    lines = {
        (f"{path}: {name}" if len(paths) > 1 else name, batch): points
        for path, document in documents.items()
        for batch, named in _lines(path, document).items()
        for name, points in named.items()
    }
    report = Report(
        folder / "compare.json",
        COLUMNS,
        key=("name", "other", "batch"),
        documents=list(documents),
    )
    for (one, other), batch in itertools.product(
        itertools.combinations(dict.fromkeys(name for name, _ in lines), 2),
        dict.fromkeys(batch for _, batch in lines),
    ):
        ratios = _ratios(lines.get((one, batch), []), lines.get((other, batch), []))
        if len(ratios) < 2:
            continue
        shortest, longest = min(ratios), max(ratios)
        report.add(
            {
                "name": one,
                "other": other,
                "batch": batch,
                "shortest": picture.short(shortest),
                "ratio_at_shortest": ratios[shortest],
                "longest": picture.short(longest),
                "ratio_at_longest": ratios[longest],
                "crossover": crossover(ratios),
                "ratios": {str(length): ratio for length, ratio in ratios.items()},
            }
        )
    if not report.rows:
        note("No two lines of one batch size have two lengths in common.")
    batches = {batch for _, batch in lines}
    drawn = {
        f"{name}, batch {batch}" if len(batches) > 1 else name: points
        for (name, batch), points in lines.items()
    }
    title = ", ".join(sorted({str(d.get("device")) for d in documents.values()}))
    panel = picture.Panel("tokens", "tokens/s", drawn)
    picture.draw(folder / "compare.png", title, [panel])


def _lines(
    path: str, document: dict[str, Any]
) -> dict[str, dict[str, list[picture.Point]]]:
    """The lines of a document by batch size and name."""
    rows = document["rows"]
    try:
        if document.get("benchmark") == "throughput":
            rows = [row | {"batch": "best"} for row in throughput.best(rows)]
        found = {
            str(batch): picture.lines_of(
                (row for row in rows if row["batch"] == batch),
                "tokens_per_s",
                names=("preset", "dtype"),
            )
            for batch in dict.fromkeys(row["batch"] for row in rows)
        }
    except KeyError as error:
        raise ValueError(
            f"{path}: expected rows of prefill, decode, throughput or train, got one "
            f"without {error}"
        ) from error
    if not any(found.values()):
        raise ValueError(f"{path}: expected rows with tokens/s, got none")
    return found


def _ratios(
    ours: list[picture.Point], theirs: list[picture.Point]
) -> dict[float, float]:
    """Tokens/s of one line over those of another, at their common lengths."""
    known = {point.x: point.y for point in theirs if point.y}
    return {p.x: p.y / known[p.x] for p in ours if p.y and p.x in known}


def crossover(ratios: dict[float, float]) -> float | str:
    """The length from which on the ratio stays on the other side of 1.

    Args:
      ratios: tokens/s of one line over those of another, by length.

    Returns:
      The length; "none" if the same line is ahead at the shortest and the longest.
    """
    points = [(math.log(x), math.log(y)) for x, y in sorted(ratios.items())]
    ahead = points[-1][1] > 0
    if (points[0][1] > 0) == ahead:
        return "none"
    for (x0, y0), (x1, y1) in reversed(list(itertools.pairwise(points))):
        if (y0 > 0) != ahead:
            return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))
    raise AssertionError("the ends differ, so that one step crosses")
