"""Files and directories that appear whole or not at all.

Both are written in a sibling directory `.NAME.TOKEN.partial`, which its writer keeps
locked. One that nobody has locked is of a process that was killed, and the next writer of
the same path removes it.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Not on Windows, where nothing is locked and nothing removed.
    fcntl = None

PARTIAL, REPLACED = "partial", "replaced"


@contextlib.contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """A new sibling directory that takes the place of `path` when the block succeeds.

    If the block raises, the sibling is removed and `path` is as it was. An existing
    directory is moved aside for the instant between two renames, and removed after
    them; whether it may be replaced is for the caller to check.

    Args:
      path: where the directory is to be, without links; missing parents are made.

    Yields:
      The directory to write into.
    """
    with _partial_directory(path) as partial:
        yield partial
        for file in partial.iterdir():
            _flush_to_disk(file)
        with _locked(path.parent):
            if path.exists():
                _swap(partial, path, path.with_name(_beside(path, REPLACED)))
            else:
                partial.rename(path)
            replaced = _siblings(path, REPLACED)
        for aside in replaced:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A new file that takes the place of `path` when the block succeeds.

    If the block raises, the new file is removed and `path` is as it was. A link is
    followed: the file that it points to is replaced. A file that is replaced keeps its
    mode; a new one has the mode that the umask allows.

    Args:
      path: where the file is to be; missing parents are made.

    Yields:
      The file to write.

    Raises:
      OSError: `path` is something other than a regular file, or cannot be written.
    """
    path = resolve(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "expected a regular file", str(path))
    with _partial_directory(path) as folder:
        partial = folder / path.name
        partial.touch()
        mode = (path if path.exists() else partial).stat().st_mode & 0o777
        yield partial
        partial.chmod(mode)
        _flush_to_disk(partial)
        partial.replace(path)


def resolve(path: str | os.PathLike[str]) -> Path:
    """The path without links.

    Raises:
      OSError: links point in a circle.
    """
    resolved = Path(os.path.realpath(path))
    if resolved.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return resolved


@contextlib.contextmanager
def _partial_directory(path: Path) -> Iterator[Path]:
    """A locked sibling directory, which is gone after the block unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under the lock, nobody takes a directory that is not locked yet for a stale one.
    with contextlib.ExitStack() as own:
        with _locked(path.parent):
            for stale in _siblings(path, PARTIAL):
                with contextlib.suppress(OSError), _locked(stale, wait=False):
                    shutil.rmtree(stale, ignore_errors=True)
            partial = path.with_name(_beside(path, PARTIAL))
            partial.mkdir()
            own.enter_context(_locked(partial))
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path, kind: str) -> str:
    return f".{path.name}.{secrets.token_hex(4)}.{kind}"


def _siblings(path: Path, kind: str) -> list[Path]:
    start, end = f".{path.name}.", f".{kind}"
    return [
        file
        for file in path.parent.iterdir()
        if file.name.startswith(start)
        and file.name.endswith(end)
        and len(file.name) == len(_beside(path, kind))
        and file.is_dir()
    ]


class LockedError(Exception):
    """Somebody else has the lock."""


def lock(descriptor: int) -> None:
    """Locks an open file until it is closed, which the end of the process does too.

    Nothing is locked where the system or the file system has no locks.

    Raises:
      LockedError: somebody else has the lock.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LockedError from error
    except OSError:
        pass


@contextlib.contextmanager
def _locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a directory, which ends with its process too.

    Raises:
      OSError: the directory cannot be opened, or, without `wait`, cannot be locked.
    """
    if fcntl is None:
        if not wait:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            # Some file systems have no locks; nothing is taken for stale there.
            if not wait:
                raise
        yield
    finally:
        os.close(descriptor)


def _swap(new: Path, path: Path, aside: Path) -> None:
    try:
        path.rename(aside)
        new.rename(path)
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise


def _flush_to_disk(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
