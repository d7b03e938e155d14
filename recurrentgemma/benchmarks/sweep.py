"""A grid of models, batch sizes and lengths, measured point by point.

    card -> points -> measure -> row, document -> summary, picture

The card says what the device can do and what each model needs. A row's figure stands
beside the ceiling that follows from both. A document is written after every point, and
the same command goes on where an earlier one was interrupted. A point that does not fit
the memory is a row that says so. A question with other axes than these calls `earlier`
and `measure_points` itself.
"""

import dataclasses
import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tqdm
from absl import flags

from recurrentgemma import _validation as check
from recurrentgemma import cost
from recurrentgemma.benchmarks import device, models, picture
from recurrentgemma.benchmarks.models import OutOfMemory, Subject
from recurrentgemma.benchmarks.report import (
    Column,
    Report,
    Row,
    note,
    read_document,
    show,
)
from recurrentgemma.config import GriffinConfig, Runtime

GIGABYTE = 1e9
LONGEST = 10**8
"""Longest text in tokens: positions are exact up to there."""
MODELS_HELP = "presets or checkpoints; NAME=PATH names one"
KEY = ("preset", "dtype", "batch", "length")
KEY_COLUMNS = tuple(map(Column, KEY, KEY, (20, 9, 6, 10)))
RATE_COLUMNS = (
    Column("tokens/s", "tokens_per_s", 10),
    Column("of ceiling %", "share_of_ceiling", 12, 100),
    Column("compile s", "compile_s", 9),
    Column("peak MB", "peak_bytes", 9, 1e-6),
)


class Point(NamedTuple):
    """A place of the grid, and how it is to be measured.

    Attributes:
      preset: Name of the model.
      dtype: Dtype in which it computes.
      batch: Number of rows.
      length: Number of tokens of a row.
      repeats: Number of samples.
      rates: What `device.rates` returned for this model and dtype.
    """

    preset: str
    dtype: str
    batch: int
    length: int
    repeats: int
    rates: dict[str, float]


def speed(samples_s: Sequence[float], tokens: int, ceiling: float | None) -> Row:
    """The median speed of a point, for its row.

    Args:
      samples_s: durations in seconds.
      tokens: number of tokens in each.
      ceiling: tokens/s that the device allows.
    """
    rate = tokens / statistics.median(samples_s)
    row: Row = {"tokens_per_s": rate, "samples_s": list(samples_s)}
    return row | ({"share_of_ceiling": rate / ceiling} if ceiling else {})


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sub-command of `recurrentgemma bench` that measures a grid."""

    name: str
    """Name of the sub-command, of its document and of its picture."""
    measure: Callable[[Subject, Point, dict[str, Any]], Row]
    """(model, point, flags) -> the figures of its row; may raise `OutOfMemory`."""
    presets: Sequence[str] | None = None
    """Default of --preset; None is all of `models.SMALL_PRESETS`."""
    lengths: str = "1k,2k,4k,8k"
    """Default of --lengths."""
    batches: str = "1"
    """Default of --batch."""
    columns: Sequence[Column] = RATE_COLUMNS
    """Columns behind those of the key."""
    panels: Callable[[list[Row]], list[picture.Panel]] = lambda rows: [
        picture.Panel("tokens", "tokens/s", picture.lines_of(rows, "tokens_per_s"))
    ]
    """Parts of the picture."""
    define_more: Callable[[flags.FlagValues], None] = lambda values: None
    """Defines flags that no other sweep has."""
    check_more: Callable[[dict[str, Any]], object] = lambda values: None
    """Raises ValueError for bad values of those flags, before anything is measured."""
    summarize: Callable[[list[Row]], dict[str, Any]] = lambda rows: {}
    """Facts of the document that follow from all rows; prints what is worth a look."""

    def define_flags(self, values: flags.FlagValues) -> None:
        """The flags of every sweep, and more."""
        presets = models.SMALL_PRESETS if self.presets is None else self.presets
        small = ", ".join([*models.SMALL_PRESETS, *models.TINY_PRESETS])
        for name, default, what in (
            ("preset", list(presets), f"models: {small} or any preset"),
            ("batch", self.batches, "numbers of rows"),
            ("lengths", self.lengths, "numbers of tokens, such as 512,4k,1M"),
            ("dtype", None, "what to compute in; by default the device's best"),
        ):
            flags.DEFINE_list(name, default, what, flag_values=values)
        what = "samples of each point"
        flags.DEFINE_integer("repeats", 5, what, lower_bound=1, flag_values=values)
        what = "GB that may be used; by default the device's, half of a machine's"
        flags.DEFINE_float("memory", None, what, flag_values=values)
        self.define_more(values)

    def settings(self, **chosen: Any) -> dict[str, Any]:
        """Values of all flags by name, for `run`: the defaults, and the chosen ones.

        Raises:
          ValueError: there is no such flag.
        """
        values = flags.FlagValues()
        self.define_flags(values)
        values.mark_as_parsed()
        found = values.flag_values_dict()
        for name, value in chosen.items():
            check.choice("settings", name, list(found))
            found[name] = value
        return found

    def run(self, values: dict[str, Any], folder: Path) -> None:
        """Measures what is missing, and draws everything.

        Args:
          values: by flag name, as `settings` returns them.
          folder: where the document and the picture go.
        """
        configs = {name: models.find(name) for name in values["preset"]}
        dtypes = _dtypes(values["dtype"])
        batches = counts("batch", values["batch"])
        lengths = counts("lengths", values["lengths"])
        memory = _memory_bytes(values["memory"])
        self.check_more(values)
        path = folder / f"{self.name}.json"
        old = earlier(path, benchmark=self.name, memory_bytes=memory)
        cards = dict(old.get("cards", {}))
        for (name, config), dtype in itertools.product(configs.items(), dtypes):
            key = f"{name}, {dtype}"
            rates = cards.get(key, {}).get("rates", {})
            cards[key] = card(config, dtype, batches, max(lengths), rates)
        copies = old.get("copies") or device.copy_bytes_per_s(memory)
        print_cards(memory, copies, cards)
        report = Report(
            path,
            (*KEY_COLUMNS, *self.columns),
            key=KEY,
            rows=old.get("rows", ()),
            benchmark=self.name,
            memory_bytes=memory,
            copies=copies,
            cards=cards,
        )
        grid = itertools.product(configs, dtypes, batches, lengths)
        points: list[Row] = [dict(zip(KEY, point, strict=True)) for point in grid]
        subject: Subject | None = None

        def measure(row: Row) -> Row:
            nonlocal subject
            config, dtype = configs[row["preset"]], row["dtype"]
            if subject is None or not subject.is_of(config, dtype):
                subject = None  # frees its memory
                subject = Subject(config, dtype, memory)
            rates = cards[f"{row['preset']}, {dtype}"]["rates"]
            point = Point(**row, repeats=values["repeats"], rates=rates)
            return self.measure(subject, point, values)

        measure_points(report, points, measure, title=self.name)
        report.facts |= self.summarize(report.rows)
        report.write()
        title = f"{self.name} on {device.name()}"
        picture.draw(path.with_suffix(".png"), title, self.panels(report.rows))
        note(f"Written to {path}")


def earlier(path: Path, **conditions: Any) -> Row:
    """The document of an earlier run on this device; empty if there is none.

    Args:
      path: its file.
      **conditions: facts that it must have, such as the name of the benchmark.

    Raises:
      ValueError: the file is damaged, or of other conditions.
    """
    if not path.exists():
        return {}
    document = read_document(path)
    for name, value in (conditions | {"device": device.name()}).items():
        if document.get(name) != value:
            raise ValueError(
                f"{path}: expected results with {name} {value}, got "
                f"{document.get(name)}; name another folder with --out, or remove it"
            )
    return document


def measure_points(
    report: Report, points: Sequence[Row], measure: Callable[[Row], Row], *, title: str
) -> None:
    """Adds a row for each point that the report does not have yet.

    Args:
      report: where the rows go; its document is written after each.
      points: values of the report's key.
      measure: what returns the figures of a point. If the memory does not suffice, the
        row says so.
      title: name of the progress bar.
    """
    missing = [point for point in points if not report.has(point)]
    for point in tqdm.tqdm(missing, desc=title, unit="point", disable=not missing):
        device.reset_peak()
        try:
            row = measure(point) | {"peak_bytes": device.peak_bytes()}
        except OutOfMemory as error:
            row = {"needed_bytes": error.needed_bytes, "remark": str(error)}
            row["out_of_memory"] = True
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and not re.search(
                "RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)
            ):
                raise
            row = {"out_of_memory": True, "remark": "out of memory while it ran"}
        report.add(point | row)


def places(texts: Sequence[str]) -> dict[str, str]:
    """Presets and paths by the names of their rows, from the texts of a flag."""
    parts = [text.partition("=") for text in texts]
    return {name: place or name for name, _, place in parts}


def counts(flag: str, texts: Sequence[str]) -> list[int]:
    """The numbers of a list such as 512,4k,1M, in order.

    Raises:
      ValueError: one is no number of tokens or rows.
    """
    found = set()
    for text in texts:
        match = re.fullmatch(r"(\d+)([kM]?)", text.strip())
        count = match and int(match[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20}[match[2]]
        if not count or count > LONGEST:
            raise ValueError(
                f"--{flag}: expected numbers from 1 to {LONGEST:,}, such as 512,4k,1M, "
                f"got {text!r}"
            )
        found.add(count)
    if not found:
        raise ValueError(f"--{flag}: expected at least one number, got none")
    return sorted(found)


def _memory_bytes(gigabytes: float | None) -> int:
    if gigabytes is None:
        return device.memory_bytes()
    return int(check.number("memory", gigabytes, above=0) * GIGABYTE)


def _dtypes(names: Sequence[str] | None) -> list[str]:
    if not names:
        return [Runtime().dtype.name]
    return [check.floating_dtype("dtype", name).name for name in names]


def card(
    config: GriffinConfig,
    dtype: str,
    batches: Sequence[int],
    length: int,
    rates: dict[str, float],
) -> dict[str, Any]:
    """What a model is and needs, and what the device can do with it.

    Args:
      config: the model.
      dtype: in which it computes.
      batches: numbers of rows.
      length: tokens of the longest row.
      rates: what `device.rates` returned in an earlier run; measured again unless it
        has all that is needed.
    """
    if not all(f"read_{batch}_rows_bytes_per_s" in rates for batch in batches):
        rates = device.rates(config, batches, dtype)
    sizes = {"dtype": dtype, "capacity": length}
    return {
        "parameters": cost.num_parameters(config),
        "parameter_bytes": cost.parameter_bytes(config, dtype),
        "length": length,
        "cache_bytes": cost.cache_bytes(config, **sizes),
        "decode_bytes": cost.decode_bytes(config, **sizes),
        "forward_flops_per_token": cost.forward_flops_per_token(config, length),
        "rates": rates,
    }


def print_cards(
    memory: int, copies: dict[str, float], cards: dict[str, dict[str, Any]]
) -> None:
    """Prints device and models, before anything is measured."""
    copy = f", copies {max(copies.values()) / 1e9:.3g} GB/s" if copies else ""
    show(f"{device.name()}: {memory / 1e9:.3g} GB may be used{copy}")
    for name, made in cards.items():
        rates = made["rates"]
        reads = [rate / 1e9 for key, rate in rates.items() if key.startswith("read")]
        show(
            f"{name}: {made['parameters']:,} parameters, "
            f"{made['parameter_bytes'] / 1e6:,.0f} MB; products "
            f"{rates['product_flops_per_s'] / 1e9:.4g} GFLOP/s, "
            f"weights read at {min(reads):.3g} to {max(reads):.3g} GB/s"
        )
        show(
            f"  a row of {made['length']:,} tokens: "
            f"{made['forward_flops_per_token'] / 1e6:,.0f} MFLOP a token, "
            f"{made['cache_bytes'] / 1e6:,.1f} MB of cache, "
            f"{made['decode_bytes'] / 1e6:,.0f} MB read for each token written"
        )
