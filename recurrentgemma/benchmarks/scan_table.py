"""The rows of the recurrence's benchmark: printed, and kept in a JSON document."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurrentgemma.benchmarks.ahead_of_time import PACKAGES, package_version
from recurrentgemma.benchmarks.provenance import provenance

Row = dict[str, Any]
KEY = {"program": 38, "workload": 18, "dtype": 10, "generation": 13}
"""What tells rows apart, and its width when printed."""


class Column:
    """A number of a row.

    Args:
      title: above it.
      key: in the row.
      scale: what it is multiplied by.
    """

    def __init__(self, title: str, key: str, scale: float = 1.0):
        self.title, self.key, self.scale = title, key, scale

    def cell(self, row: Row) -> str:
        """Right-aligned below its title; "-" if the row has no such number."""
        value = row.get(self.key)
        text = "-" if value is None else f"{value * self.scale:.4g}"
        return text.rjust(max(len(self.title), 8))


class Document:
    """Rows and where they come from; the file is written after each row.

    Args:
      path: of the file.
      columns: that are printed.
      resume: whether rows that the file holds stay until one with the same `KEY` comes.
      more: beside the rows.
    """

    def __init__(
        self, path: Path, columns: Sequence[Column], *, resume: bool, **more: Any
    ):
        self._path, self._columns = path, columns
        packages = {name: package_version(name) for name in PACKAGES}
        self._head = provenance() | {"versions": packages | {"python": sys.version}}
        self._head |= more
        self._rows: dict[tuple[str, ...], Row] = {}
        if resume and path.exists():
            rows = json.loads(path.read_text())["rows"]
            self._rows = {_key(row): row for row in rows if "commit" in row}
        titles = " ".join(column.title.rjust(8) for column in columns)
        print(f"{_names(tuple(KEY))}{titles}  remark")

    def fingerprint(self, row: Row) -> str | None:
        """Of the program of the row that the file holds for this one."""
        return self._rows.get(_key(row), {}).get("fingerprint")

    def add(self, row: Row) -> None:
        """Prints a row and writes the file."""
        self._rows[_key(row)] = row | {"commit": self._head["commit"]}
        cells = " ".join(column.cell(row) for column in self._columns)
        print(
            f"{_names(_key(row))}{cells}  {row.get('remark', '')}".rstrip(), flush=True
        )
        document = self._head | {"rows": list(self._rows.values())}
        self._path.parent.mkdir(exist_ok=True, parents=True)
        self._path.write_text(json.dumps(document, indent=1) + "\n")


def _names(texts: tuple[str, ...]) -> str:
    return "".join(
        text.ljust(width) for text, width in zip(texts, KEY.values(), strict=True)
    )


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in KEY)
