"""Documents as streams of tokens, in memory or in files that are mapped into it.

The streams of a source, one to train on and one held out, are written once. In a cache
folder they are files that later runs map, so that a run starts at once and takes no memory
for its data. Their folder is named after what they were made of: name, size and time of
change of each file, the tokenizer and the settings. It appears whole or not at all, and
may be removed whenever no run is about to start.

A digest of the tokens of each file tells whether a run that goes on has the data that it
began with; see `check_unchanged`.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

import numpy as np
import tqdm

from recurrentgemma._atomic import replace_directory, resolve
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import documents_of
from recurrentgemma.training.documents import Cuts, Document, Span, is_held_out
from recurrentgemma.training.sources import SourceFile

VERSION = 1
"""Version of the files."""
MAX_NAMED_FILES = 10_000
"""Largest number of files of which each has a digest; more have one together."""
ALL_FILES = "its files"

TRAINING, HELD_OUT = "training", "held_out"
_META = "streams.json"
_BAR_DELAY_S = 2


class _AlreadyThereError(Exception):
    """Another process wrote the same streams; they may be mapped, and so they stay."""


class TokenStream(NamedTuple):
    """Documents one after the other: N tokens."""

    tokens: np.ndarray
    """uint16 or int32 [N]."""
    positions: np.ndarray
    """int32 [N], the position of each token in its document."""
    counted: np.ndarray
    """bool [N], whether the loss has the token as a target."""
    has_responses: bool = False
    """Whether a document has a prompt, which is not to be parted from its response."""


class TokenSettings(NamedTuple):
    """How documents become tokens."""

    tokenizer: Tokenizer
    held_out_share: float = 0.0
    """Share of the documents that is held out; see `is_held_out`."""
    cuts: Cuts | None = None
    """Where texts to train on are cut before they are encoded; None cuts nothing."""


@dataclasses.dataclass(frozen=True)
class SourceStreams:
    """The tokens of a source."""

    training: TokenStream
    held_out: TokenStream | None
    """None if no document is held out."""
    num_documents: int
    """Number of documents in both."""
    digests: dict[str, str]
    """Digest of the tokens of each file, by its name."""


def stream_of(documents: Iterable[Sequence[int]]) -> TokenStream:
    """The stream of documents given as token ids, BOS first; all else counts."""
    tokens = [np.asarray(ids, np.int32) for ids in documents]
    positions = [np.arange(len(ids), dtype=np.int32) for ids in tokens]
    nothing = [np.zeros(0, np.int32)]
    places = np.concatenate(nothing + positions)
    return TokenStream(np.concatenate(nothing + tokens), places, places > 0)


def tokenize(
    source: str,
    files: Sequence[SourceFile],
    settings: TokenSettings,
    cache: Path | None = None,
) -> SourceStreams:
    """The streams of a source, from the cache if they are there.

    Where all documents would be held out, none is.

    Args:
      source: the source's name, for messages.
      files: what it consists of.
      settings: how documents become tokens.
      cache: the folder of mapped files; None keeps the streams in memory.

    Raises:
      ValueError: there is no document, one cannot be read, or the tokenizer cannot
          encode it.
      OSError: the cache cannot be written; nothing half-written is left.
    """
    if cache is None:
        parts = _MemoryParts()
        return _streams(_write(source, files, settings, parts), parts)
    folder = resolve(cache) / _key(files, settings)
    if (found := _find(folder)) is not None:
        return found
    try:
        with replace_directory(folder) as partial:
            meta = _write(source, files, settings, _FileParts(partial))
            (partial / _META).write_text(json.dumps(meta), encoding="utf-8")
            if _find(folder) is not None:
                raise _AlreadyThereError
    except _AlreadyThereError:
        pass
    except OSError as error:
        raise OSError(
            f"data_cache: could not write the tokens of {source!r} to {cache}: "
            f"{error.strerror or error}; make room, or choose another folder"
        ) from error
    return _read(folder)


def _write(
    source: str, files: Sequence[SourceFile], settings: TokenSettings, parts: "_Parts"
) -> dict[str, Any]:
    """Writes both streams; returns their sizes and digests."""
    digests: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(_Writer(name, parts, settings.tokenizer))
            for name in (TRAINING, HELD_OUT)
        }
        documents = tqdm.tqdm(
            documents_of(source, files),
            desc=f"tokens of {source}",
            unit="document",
            delay=_BAR_DELAY_S,
            leave=False,
        )
        for file, document in documents:
            held_out = is_held_out(document.name, settings.held_out_share)
            try:
                spans = document.spans(
                    settings.tokenizer, None if held_out else settings.cuts
                )
            except ValueError as error:
                raise ValueError(f"data: {source}, {file.name}: {error}") from error
            data = writers[HELD_OUT if held_out else TRAINING].add(document, spans)
            name = file.name if len(files) <= MAX_NAMED_FILES else ALL_FILES
            digests.setdefault(name, hashlib.sha256()).update(data)
    if not writers[TRAINING].meta["tokens"]:
        return _write(source, files, settings._replace(held_out_share=0.0), parts)
    return {
        **{name: writer.meta for name, writer in writers.items()},
        "digests": {name: digest.hexdigest() for name, digest in digests.items()},
    }


class _Writer:
    """Appends documents to the parts of a stream."""

    def __init__(self, name: str, parts: "_Parts", tokenizer: Tokenizer):
        small = tokenizer.vocab_size <= 1 << 16
        self._dtypes = _dtypes("uint16" if small else "int32")
        self._files = [parts.create(f"{name}.{part}") for part in self._dtypes]
        self.meta = {
            "documents": 0,
            "tokens": 0,
            "dtype": self._dtypes["tokens"],
            "has_responses": False,
        }

    def add(self, document: Document, spans: Sequence[Span]) -> bytes:
        """Returns what tells these tokens from others."""
        parts = [np.array(span.ids, self._dtypes["tokens"]) for span in spans]
        counted = np.repeat([span.counts for span in spans], [*map(len, parts)])
        counted[0] = False
        tokens = np.concatenate(parts)
        positions = np.arange(len(tokens), dtype=self._dtypes["positions"])
        for file, array in zip(self._files, (tokens, positions, counted), strict=True):
            file.write(array.data)
        self.meta["documents"] += 1
        self.meta["tokens"] += len(tokens)
        self.meta["has_responses"] |= document.has_response
        return tokens.tobytes() + counted.tobytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            if not isinstance(file, io.BytesIO):  # whose bytes are still to be read
                file.close()


class _Parts(Protocol):
    """The arrays of streams by their names."""

    def create(self, name: str) -> BinaryIO: ...
    def array(self, name: str, dtype: str, size: int) -> np.ndarray: ...


class _MemoryParts:
    def __init__(self):
        self._files: dict[str, io.BytesIO] = {}

    def create(self, name: str) -> BinaryIO:
        self._files[name] = io.BytesIO()
        return self._files[name]

    def array(self, name: str, dtype: str, size: int) -> np.ndarray:
        return np.frombuffer(self._files[name].getbuffer(), dtype, size)


class _FileParts:
    def __init__(self, folder: Path):
        self._folder = folder

    def create(self, name: str) -> BinaryIO:
        return (self._folder / name).open("wb")

    def array(self, name: str, dtype: str, size: int) -> np.ndarray:
        path = self._folder / name
        if path.stat().st_size != size * np.dtype(dtype).itemsize:
            raise ValueError(f"{path} has another size")
        # An ordinary array on the mapped bytes: indexing a `memmap` itself is slower.
        return np.asarray(np.memmap(path, dtype, "r", shape=(size,)))


def _dtypes(tokens: str) -> dict[str, str]:
    return {"tokens": tokens, "positions": "int32", "counted": "bool"}


def _streams(meta: dict[str, Any], parts: _Parts) -> SourceStreams:
    def stream(name: str) -> TokenStream | None:
        size = meta[name]["tokens"]
        if not size:
            return None
        arrays = {
            part: parts.array(f"{name}.{part}", dtype, size)
            for part, dtype in _dtypes(meta[name]["dtype"]).items()
        }
        return TokenStream(**arrays, has_responses=meta[name]["has_responses"])

    training = stream(TRAINING)
    assert training is not None, "documents_of raises where there is no document"
    num_documents = sum(meta[name]["documents"] for name in (TRAINING, HELD_OUT))
    return SourceStreams(training, stream(HELD_OUT), num_documents, meta["digests"])


def _read(folder: Path) -> SourceStreams:
    meta = json.loads((folder / _META).read_bytes())
    return _streams(meta, _FileParts(folder))


def _find(folder: Path) -> SourceStreams | None:
    """What the folder holds; None if there is none, or a file in it was damaged."""
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(files: Sequence[SourceFile], settings: TokenSettings) -> str:
    made_of = [
        VERSION,
        [(file.name, file.signature()) for file in files],
        hashlib.sha256(settings.tokenizer.model_bytes).hexdigest(),
        settings.held_out_share,
        settings.cuts,
    ]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
