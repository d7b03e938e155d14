"""Where documents come from: a name or a path, and the files behind it.

    python-stdlib          the Python files of the running Python's standard library
    FILE                   one document, or the records of a format of `READERS`
    DIRECTORY              every file below it, each by its suffix
    DIRECTORY              of `datasets.Dataset.save_to_disk`: the rows of the dataset

The held-out documents are chosen by a hash of their names, so that the split needs no list
and is the same wherever the same documents are.
"""

import json
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from recurrentgemma import _validation as check
from recurrentgemma.training.documents import Document, is_held_out
from recurrentgemma.training.sources import (
    READERS,
    NotTextError,
    RecordFile,
    SourceFile,
    TextFile,
)

__all__ = [
    "PYTHON_STDLIB",
    "Document",
    "documents_of",
    "find_files",
    "parse_sources",
    "read_documents",
    "split_held_out",
]

PYTHON_STDLIB = "python-stdlib"

# Not the library's source: installed packages, what the build of this very interpreter
# generated, and generated tables (`encodings`) and documentation (`pydoc_data`).
_NOT_STDLIB = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
_BUILD_FILES = ("_sysconfigdata", "config-")


def parse_sources(
    data: str, names: Collection[str] = ()
) -> list[tuple[str, float | None]]:
    """Sources with their weights, from `a.jsonl:0.7,books:0.3`.

    What exists as a path, or is one of `names`, is one source, commas and colons
    included.

    Args:
      data: names and paths, separated by commas; either none or all with a weight.
      names: what else is a source.

    Returns:
      Names and weights; None for the weight where there are none.

    Raises:
      ValueError: a source is missing, or there twice; a weight is not positive, or
          some sources have one and others have none.
    """

    def is_source(text: str) -> bool:
        return text in (PYTHON_STDLIB, *names) or Path(text).exists()

    sources: dict[str, float | None] = {}
    for item in [data] if is_source(data) else data.split(","):
        name, _, weight = item.strip().rpartition(":")
        if is_source(item.strip()) or not name or not _is_number(weight):
            name, weight = item.strip(), None
        if not name or name in sources:
            check.refuse("data", "sources separated by commas, each once", data)
        if weight is not None:
            weight = check.number(f"data: weight of {name}", float(weight), above=0)
        sources[name] = weight
    if len({weight is None for weight in sources.values()}) > 1:
        check.refuse("data", "a weight for each source or for none", data)
    return list(sources.items())


def find_files(source: str | Path, ignored: Collection[str] = ()) -> list[SourceFile]:
    """The files of a source, in the order of their names; nothing is read.

    Args:
      source: see the module's docstring. Of a directory, files that are empty or not
          UTF-8 are left out later.
      ignored: names of fields of records that are not used.

    Raises:
      ValueError: the source does not exist, or is a dataset with several splits.
    """
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if _is_stdlib(path, root)]
    else:
        root = Path(source)
        if root.is_file():
            root, paths = root.parent, [root]
        elif root.is_dir():
            paths = _files_of_dataset(root)
            if paths is None:
                paths = [path for path in root.rglob("*") if path.is_file()]
        else:
            raise ValueError(
                f"data: expected {PYTHON_STDLIB!r}, a directory or a file, got "
                f"{str(source)!r}, which does not exist"
            )
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return [
        RecordFile(name, path, ignored)
        if path.suffix in READERS
        else TextFile(name, path)
        for name, path in named
    ]


def documents_of(
    source: str | Path, files: Sequence[SourceFile]
) -> Iterator[tuple[SourceFile, Document]]:
    """Reads the documents of a source one by one, with the file that each is from.

    Args:
      source: the source's name, for messages.
      files: from `find_files`. Those that are not UTF-8 are left out, with a line in
          the log, unless there is just one file.

    Raises:
      ValueError: there is no document; or see `SourceFile.documents`.
    """
    left_out: list[str] = []
    found = False
    for file in files:
        try:
            for document in file.documents():
                found = True
                yield file, document
        except NotTextError:
            if len(files) == 1:
                raise
            left_out.append(file.name)
    if not found:
        raise ValueError(
            f"data: expected documents in {str(source)!r}, got {len(files)} files without "
            "UTF-8 text; give another source"
        )
    if left_out and source != PYTHON_STDLIB:
        logging.warning(
            "data: %d files of %s are left out, which are not UTF-8 text, such as %s",
            len(left_out),
            source,
            left_out[0],
        )


def read_documents(source: str | Path) -> list[Document]:
    """All documents of a source at once; see `find_files` and `documents_of`."""
    return [document for _, document in documents_of(source, find_files(source))]


def split_held_out(
    documents: list[Document], share: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Splits documents in (training, held out); see `is_held_out`.

    Where all of them would be held out, none is.
    """
    training: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        part = held_out if is_held_out(document.name, share) else training
        part.append(document)
    return (training, held_out) if training else (held_out, [])


def _is_stdlib(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return _NOT_STDLIB.isdisjoint(parts) and not parts[0].startswith(_BUILD_FILES)


def _files_of_dataset(root: Path) -> list[Path] | None:
    """The Arrow files of a dataset on disk; None for any other directory."""
    if splits := _value_in(root / "dataset_dict.json", "splits"):
        raise ValueError(
            f"data: expected one split of the dataset in {str(root)!r}, got "
            f"{', '.join(splits)}; give {root / splits[0]}"
        )
    files = _value_in(root / "state.json", "_data_files")
    return None if files is None else [root / file["filename"] for file in files]


def _value_in(path: Path, key: str) -> Any:
    """The value in a file that `datasets` writes; None if there is no such file."""
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
