"""The file of a prefix: one safetensors file of arrays by path, and metadata.

The metadata are the format's version, the digest of the model that read the text, the
capacity of a cache that has one, and a digest of all that is in the file.

Older versions are read too. In version 1 the layers of a kind shared the positions of
their keys. In versions 1 and 2 the digest of the model is of its norms alone, and that
of the content leaves the metadata out. Until late in version 3 rings of local attention
had as many slots as the window, also where the capacity was less.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recurrentgemma._atomic import replace_file
from recurrentgemma.config import GriffinConfig

FORMAT = "recurrentgemma-prefix"
VERSION = 3
_DIGESTED_METADATA = ("version", "model_digest", "capacity")
_SHARED_POSITIONS = {
    "local_attention": "key_positions",
    "global_attention": "global_key_positions",
}
"""Names in version 1 of the positions that the layers of a kind shared."""
RING_PARTS = ("keys", "values", "positions")
_COUNT = re.compile("[1-9][0-9]{0,9}")


class Stored(NamedTuple):
    """What a file holds; the capacity is None for a cache without a bound."""

    version: int
    model_digest: str
    capacity: int | None
    arrays: dict[str, np.ndarray]


def write(
    path: Path, arrays: dict[str, np.ndarray], model_digest: str, capacity: int | None
) -> None:
    """Writes a file of the newest version, whole or not at all.

    Raises:
      ValueError: it cannot be written; what was there is as it was.
    """
    metadata = {"version": str(VERSION), "model_digest": model_digest}
    if capacity is not None:
        metadata["capacity"] = str(capacity)
    metadata["content_digest"] = _content_digest(arrays, metadata)
    try:
        with replace_file(path) as partial:
            save_file(arrays, partial, metadata={"format": FORMAT, **metadata})
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Cannot write the prefix {path}: {error}. What was there is unchanged."
        ) from error


def read(path: Path) -> Stored:
    """Reads a file of any version.

    Raises:
      ValueError: it is missing, damaged, no prefix, or of a newer version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a prefix that was saved here.")
            version = _check_version(path, metadata.get("version", ""))
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise ValueError(f"There is no prefix {path}.") from error
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no prefix, or a damaged one: {error}. Read the text again."
        ) from error
    covered = metadata if version >= 3 else {}
    capacity = metadata.get("capacity")
    if (
        metadata.get("content_digest") != _content_digest(arrays, covered)
        or "model_digest" not in metadata
        or not (capacity is None or _COUNT.fullmatch(capacity))
    ):
        raise ValueError(
            f"{path} is damaged: its arrays do not fit their digest. Read the text again."
        )
    size = None if capacity is None else int(capacity)
    return Stored(version, metadata["model_digest"], size, arrays)


def _check_version(path: Path, version: str) -> int:
    if not _COUNT.fullmatch(version):
        _refuse(
            path, f"a version from 1 to {VERSION} of the prefix format", repr(version)
        )
    if int(version) > VERSION:
        raise ValueError(
            f"{path} has version {version} of the prefix format, which is newer than "
            f"{VERSION}: read it with a newer package."
        )
    return int(version)


def translate(stored: Stored, config: GriffinConfig) -> Stored:
    """What is stored now: positions for each ring, the capacity, and local rings that
    are no longer than it."""
    if stored.version == 1:
        stored = _with_positions(stored, config)
    if stored.capacity is None or stored.capacity >= config.attention_window:
        return stored
    arrays, capacity = dict(stored.arrays), stored.capacity
    for layer, kind in enumerate(config.block_types):
        names = [f"layers.{layer}.{part}" for part in RING_PARTS]
        if kind != "local_attention" or not all(
            arrays.get(name, np.zeros(0)).ndim > 1 for name in names
        ):
            continue
        # Positions below the capacity: the token at each lies in the slot of its number.
        if np.all(arrays[names[-1]][:, capacity:] < 0):
            arrays |= {name: arrays[name][:, :capacity] for name in names}
    return stored._replace(arrays=arrays)


def _with_positions(stored: Stored, config: GriffinConfig) -> Stored:
    arrays = dict(stored.arrays)
    shared = {
        kind: arrays.pop(name)
        for kind, name in _SHARED_POSITIONS.items()
        if name in arrays
    }
    for layer, kind in enumerate(config.block_types):
        if kind in shared:
            arrays[f"layers.{layer}.positions"] = shared[kind]
    if "global_attention" in shared:
        stored = stored._replace(capacity=shared["global_attention"].shape[-1])
    return stored._replace(arrays=arrays)


def fitting(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    vocab_size: int,
) -> dict[str, np.ndarray]:
    """The arrays of a file in the dtypes of its model, `expected`.

    Raises:
      ValueError: an array is missing, unknown, of another shape, or out of its range.
    """
    for name in sorted(arrays.keys() | expected.keys()):
        found, wanted = (
            getattr(side.get(name), "shape", None) for side in (arrays, expected)
        )
        if found != wanted:
            _refuse(path, f"{name} of shape {wanted}", found)
    if arrays["seen"].dtype != np.uint8:
        _refuse(path, "seen as uint8", arrays["seen"].dtype)
    largest = np.iinfo(np.int32).max
    for name, least, most in (
        ("last_token", 0, vocab_size - 1),
        ("num_tokens", 1, largest),
        ("next_position", 0, largest),
    ):
        array = arrays[name]
        is_integer = np.issubdtype(array.dtype, np.integer)
        wrong = array[(array < least) | (array > most)] if is_integer else array
        if wrong.size:
            _refuse(path, f"{name} from {least} to {most}", wrong[0])
    return {name: arrays[name].astype(expected[name].dtype) for name in expected}


def _refuse(path: Path, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{path}: expected {expected}, got {got}; read the text again")


def _content_digest(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name in _DIGESTED_METADATA:
        if name in metadata:
            digest.update(f"{name}: {metadata[name]}\n".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
