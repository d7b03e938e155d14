"""What every benchmark prints and writes: one table, one JSON document.

The document says where and with what it was measured, then the benchmark's own facts,
then its rows, every single measurement among them. It is written after each row, so
that an interrupted run loses nothing.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from recurrentgemma._atomic import replace_file
from recurrentgemma.benchmarks import device

PACKAGES = ("jax", "jaxlib", "flax", "libtpu")
"""Packages whose versions a document says."""

Row = dict[str, Any]


class Column(NamedTuple):
    """A column of the table.

    Attributes:
      title: Text above it.
      key: Place of the value in a row; "median/ours" is row["median"]["ours"].
      width: Number of characters.
      scale: Factor of a number.
    """

    title: str
    key: str
    width: int = 12
    scale: float = 1.0

    def cell(self, row: Row) -> str:
        """The value of a row, "-" if it has none."""
        value: Any = row
        for part in self.key.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            value = "-"
        elif isinstance(value, int) and self.scale == 1:
            value = f"{value:,}"
        elif not isinstance(value, str):
            value = f"{value * self.scale:.4g}"
        return value.ljust(self.width)


class Report:
    """The rows of a benchmark, printed as they come, and its JSON document.

    Args:
      path: File of the document.
      columns: Columns of the table; a row's remark stands behind them.
      key: Names of the values that tell rows apart.
      rows: Rows of an earlier run, which stay until one with the same key comes.
      origin: What `provenance` gave where another process measures; None is here.
      **facts: What the document says beside the rows.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[Column],
        *,
        key: tuple[str, ...] = ("name",),
        rows: Sequence[Row] = (),
        origin: Row | None = None,
        **facts: Any,
    ):
        self.facts = (provenance() if origin is None else origin) | facts
        self._path, self._columns, self._key = path, columns, key
        self._rows = {self._key_of(row): row for row in rows}
        show("  ".join(column.title.ljust(column.width) for column in columns))
        for row in rows:
            self._print(row)

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return list(self._rows.values())

    def has(self, row: Row) -> bool:
        """Whether there is a row with the key of this one."""
        return self._key_of(row) in self._rows

    def add(self, row: Row) -> None:
        """Prints a row and writes the document; a row may name another commit."""
        commit = row.get("commit", self.facts["commit"])
        self._rows[self._key_of(row)] = row | {"commit": commit}
        self._print(row)
        self.write()

    def write(self) -> None:
        """Writes the document: for facts that came after the last row."""
        document = self.facts | {"rows": self.rows}
        self._path.parent.mkdir(exist_ok=True, parents=True)
        with replace_file(self._path) as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)

    def _print(self, row: Row) -> None:
        cells = [column.cell(row) for column in self._columns]
        show("  ".join([*cells, row.get("remark", "")]))


def show(line: str) -> None:
    """Prints a line of the result, past a progress bar."""
    with tqdm.tqdm.external_write_mode():
        print(line.rstrip(), flush=True)


def read_document(path: Path) -> Row:
    """A document that a `Report` has written.

    Raises:
      ValueError: it is something else, or cannot be read.
    """
    expected = f"{path}: expected a result of `recurrentgemma bench`"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"{expected}, got none: {reason}; check the path") from error
    except ValueError as error:
        raise ValueError(f"{expected}, got no JSON ({error}); remove it") from error
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{expected}, got other JSON; remove it")
    return document


def provenance() -> dict[str, Any]:
    """Device, versions, commit and time, for the head of a document."""
    return {
        "device": device.name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: package_version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "commit": commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def package_version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's commit, "+changes" if files differ from it; else "unknown"."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.check_output(
        command, text=True, stderr=subprocess.DEVNULL
    ).strip()


def note(text: str) -> None:
    """Tells who watches what no table holds."""
    print(text, file=sys.stderr, flush=True)
