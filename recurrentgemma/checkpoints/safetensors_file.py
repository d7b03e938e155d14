"""Safetensors files, read and written a slice at a time.

Layout: the size of the header (8 bytes, little-endian), the header (JSON: dtype, shape
and data offsets of each tensor by name, and "__metadata__"), the data. The library of
that name maps files into memory, where pages count as the process's own, and writes
only what is in memory as a whole.
"""

import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
"""The limit of the format."""


def read_safetensors(path: Path) -> dict[str, TensorSource]:
    """The tensors of a file; only its header is read now.

    Raises:
      ValueError: the file is missing, truncated, damaged, or holds a dtype that no
        parameter has.
    """
    header, data_start = _read_header(path)
    header.pop("__metadata__", None)
    sources = {}
    for name, entry in header.items():
        try:
            dtype = DTYPES.get(entry["dtype"])
            shape = tuple(operator.index(size) for size in entry["shape"])
            begin, end = entry["data_offsets"]
            size = end - begin
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {name} has no place.") from error
        if dtype is None:
            raise ValueError(
                f"{path}: {name} is stored as {entry['dtype']}; expected one of "
                f"{', '.join(DTYPES)}."
            )
        if size != math.prod(shape) * dtype.itemsize or begin < 0:
            raise ValueError(f"{path} is damaged: {name} has no place.")
        sources[name] = file_source(path, data_start + begin, shape, dtype)
    data_end = max((e["data_offsets"][1] for e in header.values()), default=0)
    _check_size(path, data_start + data_end)
    return sources


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER_BYTES:
                raise ValueError(f"{path} is not a safetensors file.")
            _check_size(path, 8 + size)
            return dict(json.loads(file.read(size))), 8 + size
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a safetensors file.") from error


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size < expected:
        raise ValueError(
            f"{path} is truncated: {expected} bytes expected, {size} found."
        )


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
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor_bytes(tensor)
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            for block in blocks_of(tensors[name].load()):
                file.write(block)


def tensor_bytes(tensor: TensorSource) -> int:
    """Size of the tensor's data in bytes."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
