"""What documents are read from: files of text, files of records, collections of records.

Each kind has a name, `documents()`, which reads them one by one, and `signature()`, which
changes with its content: of a file its size and its time of change, so that nothing is
read; of a collection a digest.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from recurrentgemma import _validation as check
from recurrentgemma.training.documents import Document
from recurrentgemma.training.record_forms import document_of

_ARROW_FILE_MAGIC = b"ARROW1"


class NotTextError(ValueError):
    """A file is not UTF-8 text."""


class SourceFile(Protocol):
    """A part of a source that is read as a whole."""

    @property
    def name(self) -> str:
        """The path relative to the source, with forward slashes."""
        ...

    def documents(self) -> Iterator[Document]:
        """Reads the documents, in order.

        Raises:
          ValueError: the file cannot be read, or a record is malformed; the message
              names the file and the line.
        """
        ...

    def signature(self) -> Any:
        """A value for JSON that changes with the content."""
        ...


class RandomAccess(Protocol):
    """Records by their number: a list, a `datasets.Dataset`, any source of grain."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file that is one document, read at once; none if it is empty."""

    name: str
    path: Path

    def documents(self) -> Iterator[Document]:
        """The text; see `SourceFile.documents`.

        Raises:
          NotTextError: the file is not UTF-8.
        """
        try:
            # Bytes, so that line ends stay as they are.
            text = self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise NotTextError(
                f"data: expected UTF-8 text in {str(self.path)!r}, got another byte at "
                f"{error.start}; convert the file"
            ) from error
        except OSError as error:
            _cannot_read(self.path, error)
        if text:
            yield Document(self.name, text)

    def signature(self) -> list[int]:
        """Size and time of change."""
        return _stat(self.path)


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """A file of records, in a format of `READERS`."""

    name: str
    path: Path
    ignored: Collection[str] = ()
    """Names of fields that are not used; see `document_of`."""

    def documents(self) -> Iterator[Document]:
        """A document of each record; see `SourceFile.documents`."""
        reader = READERS[self.path.suffix]
        items = enumerate(reader.items(self.path), reader.first)
        try:
            for number, item in items:
                place = f"{self.path}, {reader.unit} {number}"
                document = _document_of(place, item, self.ignored)
                if document is not None:
                    yield document
        except OSError as error:
            _cannot_read(self.path, error)

    def signature(self) -> list[Any]:
        """Size and time of change, and the fields that are left out."""
        return [*_stat(self.path), *sorted(self.ignored)]


@dataclasses.dataclass(frozen=True)
class Collected:
    """Records that a Python object holds: objects as in JSONL, or texts."""

    name: str
    records: RandomAccess
    ignored: Collection[str] = ()

    def documents(self) -> Iterator[Document]:
        """A document of each record; see `SourceFile.documents`."""
        for index in range(len(self.records)):
            place = f"{self.name}, record {index}"
            document = _document_of(place, self.records[index], self.ignored)
            if document is not None:
                yield document

    def signature(self) -> str:
        """Digest of all records."""
        digest = hashlib.sha256()
        for document in self.documents():
            digest.update(json.dumps(dataclasses.astuple(document)).encode())
        return digest.hexdigest()


class Reader(NamedTuple):
    """How the records of a file are read."""

    items: Callable[[Path], Iterator[Any]]
    """The records in order: objects, or bytes of JSON."""
    unit: str
    """What a record is called in errors."""
    first: int
    """The number of the first one."""


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    arrow = _import("pyarrow", path)
    with _damaged(path, arrow.ArrowInvalid), arrow.memory_map(str(path)) as file:
        is_file = file.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        file.seek(0)
        if is_file:
            reader = arrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = arrow.ipc.open_stream(file)
        for batch in batches:
            yield from batch.to_pylist()


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    arrow = _import("pyarrow.parquet", path)
    with _damaged(path, ValueError), arrow.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _array_records(path: Path) -> Iterator[bytes]:
    grain = _import("grain", path)
    source = grain.sources.ArrayRecordDataSource([str(path)])
    for index in range(len(source)):
        yield source[index]


READERS = {
    ".jsonl": Reader(_lines, "line", 1),
    ".arrow": Reader(_arrow_rows, "row", 0),
    ".parquet": Reader(_parquet_rows, "row", 0),
    ".array_record": Reader(_array_records, "record", 0),
}
"""Formats of records, by the suffix of the file; the last three need the extra `data`."""


def parse_record(item: Any) -> Any:
    """A record as an object: of JSON in bytes, of a text, of an object itself.

    Raises:
      ValueError: the bytes are no JSON.
    """
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, bytes):
        return item
    try:
        line = item.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8 text, got another byte at {error.start}; convert the file"
        ) from error
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{getattr(error, 'msg', error)} at {getattr(error, 'pos', 0)}"
        check.refuse("record", "a JSON object", line, what)


def _document_of(place: str, item: Any, ignored: Collection[str]) -> Document | None:
    try:
        return document_of(parse_record(item), ignored)
    except ValueError as error:
        raise ValueError(f"data: {place}: {error}") from error


def _stat(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError as error:
        _cannot_read(path, error)
    return [stat.st_size, stat.st_mtime_ns]


def _cannot_read(path: Path, error: OSError) -> NoReturn:
    raise ValueError(f"data: cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _damaged(path: Path, kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise ValueError(
            f"data: expected whole {path.suffix} records in {str(path)!r}, got others, "
            f"or a damaged file: {error}"
        ) from error


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"data: expected {module.split('.')[0]} to be installed to read {path}, got "
            "none; run pip install 'recurrentgemma[data]'"
        ) from error
