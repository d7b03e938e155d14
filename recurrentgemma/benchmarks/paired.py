"""Timing in turn, so that ratios survive a noisy machine.

Two measurements taken one after the other share the machine's mood; two taken minutes
apart do not. Every round measures each worker once, in alternating order, and the ratio
is formed inside the round. The figure is the median over rounds; every single
measurement is kept.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from recurrentgemma.benchmarks.report import Column, Row
from recurrentgemma.generation.results import Sample

OURS = "ours"


class Disagreement(RuntimeError):
    """Somebody computes something else, so that timing it would mean nothing."""


class Named(Protocol):
    """What is measured: a process of an opponent, or a `Way`."""

    name: str
    peak_bytes: int | None
    """Peak memory of its last measurement, if that is known."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """One row of a comparison."""

    name: str
    unit: str
    higher_is_better: bool
    sample: Callable[[Any, int], float]
    """(worker, round) -> value in `unit`; round -1 is the warm-up."""
    rounds: int = 5
    warm_up: bool = True
    leave_out: tuple[str, ...] = ()
    """Opponents that cannot do this at all."""

    def advantage(self, ours: Sequence[float], theirs: Sequence[float]) -> float:
        """Median over rounds of how many times better ours is."""
        sign = 1 if self.higher_is_better else -1
        pairs = zip(ours, theirs, strict=True)
        return statistics.median((a / b) ** sign for a, b in pairs)


def compare(measure: Measure, workers: Sequence[Named]) -> Row:
    """Warms the workers up, then measures them in turn: A B C, C B A, A B C, ...

    Returns:
      The row of the document; `load_average`, of the machine's last minute, is above
      the number of cores if others were at work.
    """
    taking_part = [w for w in workers if w.name not in measure.leave_out]
    if measure.warm_up:
        for worker in taking_part:
            measure.sample(worker, -1)
    samples: dict[str, list[float]] = {w.name: [] for w in taking_part}
    peaks = {w.name: 0 for w in taking_part}
    for index in range(measure.rounds):
        for worker in taking_part if index % 2 == 0 else reversed(taking_part):
            samples[worker.name].append(measure.sample(worker, index))
            peaks[worker.name] = max(peaks[worker.name], worker.peak_bytes or 0)
    return {
        "name": measure.name,
        "unit": measure.unit,
        "higher_is_better": measure.higher_is_better,
        "samples": samples,
        "peak_bytes": peaks,
        "load_average": os.getloadavg()[0],
        "median": {name: statistics.median(values) for name, values in samples.items()},
        "advantage": {
            name: measure.advantage(samples[OURS], values)
            for name, values in samples.items()
            if name != OURS
        },
    }


def columns(names: Sequence[str], *more: Column) -> list[Column]:
    """Medians by worker; behind an opponent, how many times better ours is."""
    found = [Column("", "name", 30), Column("unit", "unit", 8)]
    for name in names:
        found.append(Column(name, f"median/{name}", max(len(name), 8)))
        if name != OURS:
            found.append(Column("ours is x", f"advantage/{name}", 9))
    return [*found, *more]


@dataclasses.dataclass
class Way:
    """One way of writing texts in this process."""

    name: str
    run: Callable[[], list[Sample]]
    peak_bytes: int | None = None

    def tokens_per_s(self, _: int) -> float:
        """Speed of one run."""
        start = time.perf_counter()
        count = sum(len(sample.tokens) for sample in self.run())
        return count / (time.perf_counter() - start)


def compare_ways(name: str, ours: Way, other: Way, rounds: int) -> Row:
    """Checks that both ways write the same tokens, then compares their speed.

    Returns:
      The row of the document, in tokens/s.

    Raises:
      Disagreement: they write different tokens.
    """
    pairs = list(zip(ours.run(), other.run(), strict=True))
    different = sum(a.tokens != b.tokens for a, b in pairs)
    if different:
        raise Disagreement(
            f"{name}: {different} of {len(pairs)} texts differ between {ours.name} and "
            f"{other.name}"
        )
    measure = Measure(
        name,
        "tokens/s",
        higher_is_better=True,
        sample=Way.tokens_per_s,
        rounds=rounds,
        warm_up=False,
    )
    return compare(measure, [ours, other])
