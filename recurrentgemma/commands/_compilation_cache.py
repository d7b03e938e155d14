"""JAX's persistent compilation cache, kept for the command in the user's cache folder.

JAX_ENABLE_COMPILATION_CACHE=false turns it off and JAX_COMPILATION_CACHE_DIR names
another folder, as for any program that uses JAX. A folder that cannot be used, and
entries that cannot be read, cost the time of compiling again and nothing else.
"""

import contextlib
import hashlib
import os
import platform
import re
import warnings
from pathlib import Path

MAX_BYTES = 1 << 30
"""Size of all entries above which the oldest are removed."""

_ENTRIES = "*-cache"
_FAILED = "Error (reading|writing) persistent compilation cache"
# Programs that compile sooner are not worth a file.
_MIN_COMPILE_SECONDS = "0.05"


def enable() -> None:
    """Turns the cache on by environment variables, which JAX reads when it is imported.

    Does nothing where the user has named a folder, or none can be used.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):
        folder = user_folder() / _machine()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Entries are programs to run: somebody else's folder is not trusted.
        is_own = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
        if not is_own or not os.access(folder, os.W_OK | os.X_OK):
            return
        remove_oldest(folder.parent, MAX_BYTES)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        variable = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
        os.environ.setdefault(variable, _MIN_COMPILE_SECONDS)
        _silence(folder)


def user_folder() -> Path:
    """The folder of all entries, in XDG_CACHE_HOME or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # Relative paths are to be ignored (XDG Base Directory Specification).
    base = base if base.is_absolute() else Path.home() / ".cache"
    return base / "recurrentgemma" / "jax"


def remove_oldest(folder: Path, max_bytes: int) -> None:
    """Removes the entries written first, at any depth, until the others fit."""
    entries = [(entry.stat(), entry) for entry in folder.rglob(_ENTRIES)]
    total = sum(stat.st_size for stat, _ in entries)
    for stat, entry in sorted(entries, key=lambda pair: pair[0].st_mtime):
        if total <= max_bytes:
            return
        entry.unlink(missing_ok=True)
        total -= stat.st_size


def _machine() -> str:
    """A name for processors that run the same machine code.

    JAX does not look at them: a home folder may be shared by different machines.
    """
    known = platform.machine(), platform.processor()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        known += tuple(
            re.findall(r"^(?:flags|Features|model name)\s*:.*", text, re.MULTILINE)[:2]
        )
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def _silence(folder: Path) -> None:
    """JAX warns of an entry that it cannot use, and never replaces it: remove all."""
    show = warnings.showwarning

    def showwarning(message, *args, **kwargs):
        if not re.match(_FAILED, str(message)):
            show(message, *args, **kwargs)
            return
        with contextlib.suppress(OSError):
            remove_oldest(folder, 0)

    warnings.filterwarnings("always", message=_FAILED)
    warnings.showwarning = showwarning
