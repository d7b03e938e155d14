"""The file of a prefix: one safetensors file of arrays by path, and metadata.

The metadata are the format's version, the digest of the model that read the text, the
capacity of a cache that has one, and a digest of all that is in the file.

Older versions are read too. In version 1 the layers of a kind shared the positions of
their keys. In versions 1 and 2 the digest of the model is of its norms alone, and that
of the content leaves the metadata out.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

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


class Stored(NamedTuple):
    """What a file holds."""

    version: int
    model_digest: str
    capacity: int | None
    """Capacity of the cache; None of a cache that needs none."""
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
        or not (capacity is None or re.fullmatch("[1-9][0-9]{0,9}", capacity))
    ):
        raise ValueError(
            f"{path} is damaged: its arrays do not fit their digest. Read the text again."
        )
    return Stored(
        version,
        metadata["model_digest"],
        None if capacity is None else int(capacity),
        arrays,
    )


def _check_version(path: Path, version: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,9}", version):
        raise ValueError(
            f"{path}: expected a version from 1 to {VERSION} of the prefix format, got "
            f"{version!r}; read the text again"
        )
    if int(version) > VERSION:
        raise ValueError(
            f"{path} has version {version} of the prefix format, which is newer than "
            f"{VERSION}: read it with a newer package."
        )
    return int(version)


def translate(stored: Stored, config: GriffinConfig) -> Stored:
    """What version 2 and later would have stored: positions for each ring, and the
    capacity."""
    if stored.version > 1:
        return stored
    shared = {name: stored.arrays.get(name) for name in _SHARED_POSITIONS.values()}
    arrays = {name: x for name, x in stored.arrays.items() if name not in shared}
    for layer, kind in enumerate(config.block_types):
        positions = shared.get(_SHARED_POSITIONS.get(kind, ""))
        if positions is not None:
            arrays[f"layers.{layer}.positions"] = positions
    positions = shared[_SHARED_POSITIONS["global_attention"]]
    if positions is not None:
        stored = stored._replace(capacity=positions.shape[-1])
    return stored._replace(arrays=arrays)


def check_arrays(
    path: Path, stored: Stored, shapes: dict[str, tuple[int, ...]], vocab_size: int
) -> None:
    """Raises ValueError unless these are the arrays of a prefix.

    Args:
      path: for the error.
      stored: what the file holds.
      shapes: shape of each array.
      vocab_size: V; token ids are below it.
    """
    found = {name: array.shape for name, array in stored.arrays.items()}
    if strange := sorted(dict(found.items() ^ shapes.items())):
        name = strange[0]
        raise ValueError(
            f"{path}: expected {name} of shape {shapes.get(name)}, got "
            f"{found.get(name)}; read the text again"
        )
    if stored.arrays["seen"].dtype != np.uint8:
        raise ValueError(
            f"{path}: expected seen as uint8, got {stored.arrays['seen'].dtype}; read "
            "the text again"
        )
    limits = {
        "last_token": (0, vocab_size - 1),
        "num_tokens": (1, np.iinfo(np.int32).max),
        "next_position": (0, np.iinfo(np.int32).max),
    }
    for name, (least, most) in limits.items():
        array = stored.arrays[name]
        is_integer = np.issubdtype(array.dtype, np.integer)
        wrong = array[(array < least) | (array > most)] if is_integer else array
        if wrong.size:
            raise ValueError(
                f"{path}: expected {name} from {least} to {most}, got {wrong[0]}; "
                "read the text again"
            )


def _content_digest(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name in _DIGESTED_METADATA:
        if name in metadata:
            digest.update(f"{name}: {metadata[name]}\n".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
