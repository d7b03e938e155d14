"""Files and directories that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """A new sibling directory that takes the place of `path` when the block succeeds.

    If the block raises, the sibling is removed and `path` is as it was. An existing
    directory is moved aside for the instant between two renames, and removed after
    them; whether it may be replaced is for the caller to check.

    Args:
      path: where the directory is to be; missing parents are made.

    Yields:
      The directory to write into.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial = path.with_name(f".{path.name}.{token}.partial")
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            _flush_to_disk(file)
        if path.exists():
            _swap(partial, path, path.with_name(f".{path.name}.{token}.replaced"))
        else:
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A new sibling file that takes the place of `path` when the block succeeds.

    If the block raises, the sibling is removed and `path` is as it was.

    Args:
      path: where the file is to be; missing parents are made.

    Yields:
      The file to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        _flush_to_disk(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _swap(new: Path, path: Path, aside: Path) -> None:
    try:
        path.rename(aside)
        new.rename(path)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _flush_to_disk(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
