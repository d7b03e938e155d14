"""Lines over a length, as a PNG. Needs matplotlib (extra `plot`)."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recurrentgemma.benchmarks.report import Row, note

MARKERS = "os^Dvp*X"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Colours that most colour-blind readers can tell apart (Okabe and Ito)."""
RESOLUTION = 200
"""Dots an inch."""
LEVEL = 2
"""Values that differ by less than this factor are drawn as level as they are."""


class Point(NamedTuple):
    """A point of a line.

    Attributes:
      x: Above 0.
      y: Above 0, or a share; None where the memory did not suffice.
      is_synthetic: Whether the cache was filled, not read; drawn hollow.
    """

    x: float
    y: float | None
    is_synthetic: bool = False


class Panel(NamedTuple):
    """Axes and lines of one part of a picture.

    Attributes:
      x_label: Name and unit of x.
      y_label: Name and unit of y.
      lines: Points by the line's name.
      is_over_length: Whether x is a number of tokens, with a tick at each.
      is_linear: Whether y is linear, from 0; otherwise it is logarithmic.
    """

    x_label: str
    y_label: str
    lines: dict[str, list[Point]]
    is_over_length: bool = True
    is_linear: bool = False


def lines_of(
    rows: Iterable[Row],
    y: str,
    x: str = "length",
    names: Sequence[str] = ("preset", "dtype", "batch"),
) -> dict[str, list[Point]]:
    """A line for each combination of values of `names`, named by those that differ.

    Args:
      rows: of a document.
      y: key of the value.
      x: key of the length.
      names: keys that tell lines apart.
    """
    rows = list(rows)
    telling = [name for name in names if len({row.get(name) for row in rows}) > 1]
    found: dict[str, list[Point]] = {}
    for row in rows:
        if row.get(y) is None and not row.get("out_of_memory"):
            continue
        parts = [_part(name, row.get(name)) for name in telling or names[:1]]
        point = Point(row[x], row.get(y), row.get("synthetic", False))
        found.setdefault(", ".join(parts), []).append(point)
    return {name: sorted(found[name], key=lambda point: point.x) for name in found}


def _part(name: str, value: Any) -> str:
    return f"batch {value}" if name == "batch" else str(value)


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Writes a picture; without matplotlib one sentence says what is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        note(f"{path} is not drawn: pip install 'recurrentgemma[plot]' for matplotlib.")
        return
    panels = [panel for panel in panels if _known(panel)]
    if not panels:
        note(f"{path} is not drawn: there is nothing to show.")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for j, (name, points) in enumerate(panel.lines.items()):
            color, marker = COLORS[j % len(COLORS)], MARKERS[j % len(MARKERS)]
            _draw_line(axes, name, points, color, marker)
        everything = [point for line in panel.lines.values() for point in line]
        if any(point.is_synthetic for point in everything):
            label = "cache filled, not read"
            axes.plot([], [], "o", color="gray", markerfacecolor="white", label=label)
        axes.set_xscale("log", base=2 if panel.is_over_length else 10)
        logarithmic = [(axes.xaxis, (1,)), (axes.yaxis, (1, 2, 5))]
        if panel.is_linear:
            axes.set_ylim(bottom=0)
            logarithmic.pop()
        else:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            if high < LEVEL * low:
                axes.set_ylim(low / LEVEL, high * LEVEL)
        for axis, steps in logarithmic:
            axis.set_major_locator(LogLocator(10, subs=steps))
            axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
            axis.set_minor_formatter(NullFormatter())
        if panel.is_over_length:
            ticks = sorted({point.x for point in everything})
            axes.set_xticks(ticks, [short(tick) for tick in ticks])
            axes.tick_params("x", which="minor", bottom=False)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=RESOLUTION)
    note(f"Written to {path}")


def _known(panel: Panel) -> list[Point]:
    """The points of all lines that have a value."""
    return [p for line in panel.lines.values() for p in line if p.y is not None]


def _draw_line(axes: Any, name: str, points: list[Point], color: str, marker: str):
    known = [point for point in points if point.y is not None]
    xs, ys = [p.x for p in known], [p.y for p in known]
    axes.plot(xs, ys, marker=marker, color=color, label=name)
    hollow = [(p.x, p.y) for p in known if p.is_synthetic]
    if hollow:
        axes.plot(*zip(*hollow, strict=True), marker, color=color, mfc="white")
    if known and len(known) < len(points):
        axes.annotate(
            "out of memory beyond",
            (xs[-1], ys[-1]),
            textcoords="offset points",
            xytext=(-20, -14),
            color=color,
            fontsize="small",
        )


def short(length: float) -> str:
    """16384 as "16k"; what is no multiple of 1024 in full."""
    count = int(length)
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if count >= unit and count % unit == 0 and count == length:
            return f"{count // unit}{letter}"
    return f"{length:,.0f}"
