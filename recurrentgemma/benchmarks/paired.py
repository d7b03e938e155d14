"""Timing implementations in turn, so that their ratio survives a noisy machine.

Two measurements taken one after the other share the machine's mood; two taken minutes
apart do not. Every round measures each worker once, in alternating order, and the ratio
is formed inside the round. What is reported is the median over rounds; every single
measurement is kept.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from recurrentgemma.benchmarks.opponents.worker import Worker

OURS = "ours"


@dataclasses.dataclass(frozen=True)
class Measure:
    """One line of the comparison."""

    name: str
    unit: str
    higher_is_better: bool
    sample: Callable[[Worker, int], float]
    """(worker, round) -> value in `unit`; round -1 is the warm-up."""
    rounds: int = 5
    warm_up: bool = True
    leave_out: tuple[str, ...] = ()
    """Opponents that cannot do this at all."""


@dataclasses.dataclass
class Result:
    """Values by worker, one a round."""

    name: str
    unit: str
    higher_is_better: bool
    samples: dict[str, list[float]]
    peak_bytes: dict[str, int]
    load_average: float
    """Of the machine's last minute: above the number of cores, others were at work."""

    def median(self, worker: str) -> float:
        """In `unit`."""
        return statistics.median(self.samples[worker])

    def advantage(self, opponent: str) -> float:
        """Median over rounds of how many times better ours is than the opponent."""
        pairs = zip(self.samples[OURS], self.samples[opponent], strict=True)
        sign = 1 if self.higher_is_better else -1
        return statistics.median((ours / theirs) ** sign for ours, theirs in pairs)

    def to_dict(self) -> dict[str, Any]:
        """For the JSON document."""
        workers = list(self.samples)
        return dataclasses.asdict(self) | {
            "median": {worker: self.median(worker) for worker in workers},
            "advantage": {w: self.advantage(w) for w in workers if w != OURS},
        }


def compare(measure: Measure, workers: Sequence[Worker]) -> Result:
    """Warms the workers up, then measures them in turn."""
    taking_part = [w for w in workers if w.name not in measure.leave_out]
    if measure.warm_up:
        for worker in taking_part:
            measure.sample(worker, -1)
    return take_turns(measure, taking_part)


def take_turns(measure: Measure, workers: Sequence[Worker]) -> Result:
    """Measures the workers in turn: A B C, C B A, A B C, ..."""
    samples: dict[str, list[float]] = {w.name: [] for w in workers}
    peaks = {w.name: 0 for w in workers}
    for index in range(measure.rounds):
        for worker in workers if index % 2 == 0 else reversed(workers):
            samples[worker.name].append(measure.sample(worker, index))
            peaks[worker.name] = max(peaks[worker.name], worker.peak_bytes or 0)
    return Result(
        measure.name,
        measure.unit,
        measure.higher_is_better,
        samples,
        peaks,
        load_average=os.getloadavg()[0],
    )


def table(results: Sequence[Result]) -> str:
    """Medians, and how many times better ours is, in columns."""
    names = dict.fromkeys(name for result in results for name in result.samples)
    opponents = [name for name in names if name != OURS]
    header = ["", OURS, *(f"{name} (x)" for name in opponents), "unit"]
    rows = [header]
    for result in results:
        row = [result.name, f"{result.median(OURS):.4g}"]
        for name in opponents:
            if name in result.samples:
                text = f"{result.median(name):.4g} ({result.advantage(name):.2f})"
            else:
                text = "-"
            row.append(text)
        rows.append([*row, result.unit])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )
