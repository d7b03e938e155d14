"""Documents to train on: from a directory, a file, or Python's own standard library.

A document is one file. The held-out documents are chosen by a hash of their names, so
that the split needs no list and is the same wherever the same files are.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

PYTHON_STDLIB = "python-stdlib"

# Not the library's source: installed packages, what the build of this very interpreter
# generated, and generated tables (`encodings`) and documentation (`pydoc_data`).
_NOT_STDLIB = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
_BUILD_FILES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """A text and its name: the path relative to the source, with forward slashes."""

    name: str
    text: str


def read_documents(source: str | Path) -> list[Document]:
    """Reads every document of a source, in the order of their names.

    Args:
        source: `python-stdlib` (the `*.py` files of the running Python's standard
            library and its test suites, less generated tables), a directory (every file
            below it), or a file. Files that are empty or not UTF-8 are left out.

    Raises:
        ValueError: the source does not exist, or holds no text.
    """
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if _is_stdlib(path, root)]
    else:
        root = Path(source)
        if root.is_file():
            root, paths = root.parent, [root]
        elif root.is_dir():
            paths = [path for path in root.rglob("*") if path.is_file()]
        else:
            raise ValueError(
                f"data: expected {PYTHON_STDLIB!r}, a directory or a file, got "
                f"{str(source)!r}, which does not exist"
            )
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    texts = ((name, _read_text(path)) for name, path in named)
    documents = [Document(name, text) for name, text in texts if text]
    if not documents:
        raise ValueError(f"data: no UTF-8 text in {str(source)!r}")
    return documents


def split_held_out(
    documents: list[Document], share: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """Splits documents in (training, held out).

    Held out are those whose name has a SHA-256 that, read as a fraction of its range,
    is below `share`. Where that would be all of them, none is held out.
    """
    training: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.name.encode()).digest()
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        (held_out if fraction < share else training).append(document)
    return (training, held_out) if training else (held_out, [])


def _is_stdlib(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return _NOT_STDLIB.isdisjoint(parts) and not parts[0].startswith(_BUILD_FILES)


def _read_text(path: Path) -> str | None:
    try:
        # Bytes, so that line ends stay as they are.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
