"""Safetensors files, read and written a slice at a time.

Layout: the size of the header (8 bytes, little-endian), the header (JSON: dtype, shape
and data offsets of each tensor by name, and "__metadata__"), the data. The library of
that name maps files into memory, where pages count as the process's own, and writes
only what is in memory as a whole.

Files that are written here hold a CRC-32 of each tensor in "__metadata__", which is
compared when the tensor is read.
"""

import json
import math
import operator
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from recurrentgemma.checkpoints.checksums import verified
from recurrentgemma.checkpoints.tensors import (
    TensorSource,
    blocks_of,
    file_source,
)

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
QUANTIZED, QUANTIZED_DTYPES = ".values", {"I8": np.dtype(np.int8)}
"""How the names of quantised values end, and what they are stored as."""
DTYPE_NAMES = {d: name for name, d in {**DTYPES, **QUANTIZED_DTYPES}.items()}
CHECKSUM = "crc32 of "
"""What the keys of checksums in "__metadata__" begin with."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the format."""


def read_safetensors(path: Path) -> dict[str, TensorSource]:
    """The tensors of a file; only its header is read now.

    Raises:
      ValueError: the file is missing, truncated, damaged, or holds a dtype that no
        parameter has.
    """
    header, data_start = _read_header(path)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        metadata = {}
    sources, places = {}, []
    for name, entry in header.items():
        try:
            dtypes = QUANTIZED_DTYPES if name.endswith(QUANTIZED) else DTYPES
            dtype = dtypes.get(entry["dtype"])
            shape = tuple(operator.index(size) for size in entry["shape"])
            begin, end = (operator.index(offset) for offset in entry["data_offsets"])
            size = end - begin
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {name} has no place.") from error
        if dtype is None:
            raise ValueError(
                f"{path}: {name} is stored as {entry['dtype']}; expected one of "
                f"{', '.join(dtypes)}."
            )
        if (
            size != math.prod(shape) * dtype.itemsize
            or begin < 0
            or min(shape, default=1) < 0
        ):
            raise ValueError(f"{path} is damaged: {name} has no place.")
        places.append((begin, end, name))
        sources[name] = file_source(path, data_start + begin, shape, dtype)
        if CHECKSUM + name in metadata:
            checksum = metadata[CHECKSUM + name]
            sources[name] = verified(sources[name], checksum, f"{path}: {name}")
    _check_places(path, sorted(places), data_start)
    return sources


def read_metadata(path: Path) -> dict[str, str]:
    """The text in the header of a file.

    Raises:
      ValueError: the file is missing, or not a safetensors file.
    """
    metadata = _read_header(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _check_places(
    path: Path, places: list[tuple[int, int, str]], data_start: int
) -> None:
    """Raises ValueError unless the tensors fill the file, one behind the other.

    Args:
      path: the file.
      places: begin and end in the data, and name, of each tensor, in order.
      data_start: where the data begins in the file.
    """
    end_before, other = 0, "the header"
    for begin, end, name in places:
        if begin < end_before:
            raise ValueError(f"{path} is damaged: {other} and {name} overlap.")
        if begin > end_before:
            raise ValueError(
                f"{path} is damaged: {begin - end_before} bytes between {other} and "
                f"{name} belong to no tensor."
            )
        end_before, other = end, name
    excess = _check_size(path, data_start + end_before)
    if excess:
        raise ValueError(
            f"{path} is damaged: {excess} bytes at its end belong to no tensor."
        )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER_BYTES:
                raise ValueError(f"{path} is not a safetensors file.")
            _check_size(path, 8 + size)
            encoded = file.read(size)
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    try:
        return dict(json.loads(encoded)), 8 + size
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file.") from error


def _check_size(path: Path, expected: int) -> int:
    """The number of bytes beyond those expected, of which none may be missing."""
    size = path.stat().st_size
    if size < expected:
        raise ValueError(
            f"{path} is truncated: {expected} bytes expected, {size} found."
        )
    return size - expected


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]
) -> None:
    """Writes a file, one tensor at a time.

    Args:
      path: the file, which must not exist.
      tensors: by name; larger dtypes come first, which aligns all of them.
      metadata: text to keep in the header.

    Raises:
      OSError: the file cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    checksums = dict.fromkeys(names, 0)
    with path.open("xb") as file:
        file.write(_header(tensors, metadata, checksums))
        for name in names:
            for block in blocks_of(tensors[name].load()):
                checksums[name] = zlib.crc32(block, checksums[name])
                file.write(block)
        file.seek(0)
        file.write(_header(tensors, metadata, checksums))


def _header(
    tensors: Mapping[str, TensorSource],
    metadata: Mapping[str, str],
    checksums: Mapping[str, int],
) -> bytes:
    """The size and the header; tensors lie in the order of `checksums`."""
    stored = {f"{CHECKSUM}{name}": f"{value:08x}" for name, value in checksums.items()}
    header: dict[str, Any] = {"__metadata__": {**metadata, **stored}}
    end = 0
    for name in checksums:
        tensor = tensors[name]
        begin, end = end, end + tensor_bytes(tensor)
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def tensor_bytes(tensor: TensorSource) -> int:
    """Size of the tensor's data in bytes."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
