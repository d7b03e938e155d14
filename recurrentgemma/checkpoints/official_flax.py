"""The released Flax layout: an Orbax PyTree directory of {"params": ...}.

Orbax's file `_METADATA` lists the tensors, which lie in a key-value store of zarr
arrays. They are read and written through tensorstore, as Orbax itself does, because
Orbax would want the whole model in memory.

The store has no checksum of its values. `checksums.json`, which is written beside it and
which Orbax ignores, holds the CRC-32 of each tensor.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore

from recurrentgemma.checkpoints.checksums import crc32, verified
from recurrentgemma.checkpoints.official import (
    slicing_axis,
    with_other_files,
    write_other_files,
)
from recurrentgemma.checkpoints.safetensors_file import DTYPES
from recurrentgemma.checkpoints.stored import NOT_THIS_JSON, Stored, write_json
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig
from recurrentgemma.tokenizer import Tokenizer

METADATA_FILE = "_METADATA"
OCDBT_FILE = "manifest.ocdbt"
CHECKSUMS_FILE = "checksums.json"
FILES = re.compile(
    r"config\.json|tokenizer\.model|checksums\.json|_METADATA|manifest\.ocdbt"
    r"|d(/[0-9a-f]{32})?"
)
ROOT = "params"
DICT_KEY = 2
"""What Orbax calls a key of a dictionary."""
MIN_KEPT_BYTES = 1 << 20
"""Smaller parts are read again when needed, so that they do not displace a large one."""
CHUNK_BYTES = 1 << 22
"""Size of the parts that are stored, compressed and read separately."""
COMMIT_BYTES = 1 << 24
"""Written parts become files, some for each commit, when they are this large."""
ONE_AT_A_TIME = {"limit": 1}
CONTEXT = {
    "data_copy_concurrency": ONE_AT_A_TIME,
    "file_io_concurrency": ONE_AT_A_TIME,
}
"""More threads gain nothing, and each keeps the memory that it once needed."""


def detect(path: Path) -> bool:
    """Whether the directory, or the only one in it that may, holds an Orbax PyTree."""
    return _find(path) is not None


def _find(path: Path) -> Path | None:
    if (path / METADATA_FILE).is_file():
        return path
    if not path.is_dir():
        return None
    inside = [file.parent for file in path.glob(f"*/{METADATA_FILE}")]
    return inside[0] if len(inside) == 1 else None


def read(path: Path) -> Stored:
    """The checkpoint; raises ValueError if it is damaged."""
    path = _find(path) or path
    try:
        metadata = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))
        names = [
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
        ]
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    except (OSError, RecursionError, *NOT_THIS_JSON) as error:
        raise ValueError(f"{path / METADATA_FILE} is not Orbax metadata.") from error
    reader = _Reader(path)
    tensors = {
        name.removeprefix(f"{ROOT}."): reader.source(name, driver) for name in names
    }
    for name, checksum in _read_checksums(path, tensors).items():
        tensors[name] = verified(tensors[name], checksum, f"{path}: {name}")
    return with_other_files(path, tensors, [*path.rglob("*")])


def _read_checksums(path: Path, tensors: Mapping[str, TensorSource]) -> dict[str, str]:
    """The checksum of each tensor, by name; none if nobody wrote them."""
    file = path / CHECKSUMS_FILE
    try:
        checksums = json.loads(file.read_text(encoding="utf-8"))["crc32"]
        return {name: checksums[name] for name in tensors}
    except FileNotFoundError:
        return {}
    except (OSError, RecursionError, *NOT_THIS_JSON) as error:
        raise ValueError(
            f"{file} is damaged: expected the checksum of each tensor."
        ) from error


def _specification(
    path: Path, name: str, *, driver: str = "zarr", ocdbt: bool = True
) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{path.resolve()}/"}
    if ocdbt:
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{path.resolve() / name}/"}
    return {"driver": driver, "kvstore": store}


class _Reader:
    """Reads slices of tensors; keeps the last part that was decoded.

    A part is decoded as a whole, and the two tensors of a fused one share its parts.
    """

    def __init__(self, path: Path):
        self._path = path
        self._context = tensorstore.Context(CONTEXT)
        self._key: tuple[str, int, int] | None = None
        self._part = np.empty(0)

    def source(self, name: str, driver: str) -> TensorSource:
        try:
            ocdbt = (self._path / OCDBT_FILE).exists()
            specification = _specification(self._path, name, driver=driver, ocdbt=ocdbt)
            store = tensorstore.open(
                specification, context=self._context, open=True, read=True
            ).result()
        except ValueError as error:
            raise self._error(name, error) from error
        dtype, shape = np.dtype(store.dtype.numpy_dtype), tuple(store.shape)
        if dtype not in DTYPES.values():
            raise ValueError(f"{self._path}: {name} is stored as {dtype}.")
        parts = store.chunk_layout.read_chunk.shape or shape
        chunk = [part or size for part, size in zip(parts, shape, strict=True)]
        axis = slicing_axis(name, shape, chunk)
        step = chunk[axis] if chunk else 1

        def within(start: int, stop: int) -> tuple[slice, ...]:
            return (*(slice(None),) * axis, slice(start, stop))

        def read(start: int, stop: int) -> np.ndarray:
            first = start // step * step
            last = min(-(-stop // step) * step, shape[axis])
            if self._key != (name, first, last):
                try:
                    part = store[within(first, last)].read().result()
                except ValueError as error:
                    raise self._error(name, error) from error
                if part.nbytes < MIN_KEPT_BYTES:
                    return part[within(start - first, stop - first)]
                self._key, self._part = (name, first, last), part
            return self._part[within(start - first, stop - first)]

        return TensorSource(shape, dtype, axis, read)

    def _error(self, name: str, error: ValueError) -> ValueError:
        reason = str(error).split(" [")[0]
        return ValueError(f"{self._path} is damaged: cannot read {name}: {reason}")


def write(
    path: Path,
    config: GriffinConfig,
    tensors: Mapping[str, TensorSource],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes into an empty directory; raises ValueError if the official package has no
    such model."""
    tree, checksums = {}, {}
    writer = _Writer(path)
    for name, source in write_other_files(path, config, tensors, tokenizer).items():
        keys = (ROOT, *re.findall(r"blocks\.\d+|[^.]+", name))
        checksums[name] = writer.write(".".join(keys), source)
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    writer.commit()
    metadata = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
    write_json(path / METADATA_FILE, metadata)
    write_json(path / CHECKSUMS_FILE, {"crc32": checksums})


class _Writer:
    """Writes tensors part by part; each commit adds files, so parts share commits."""

    def __init__(self, path: Path):
        self._path = path
        # Shared: stores of different contexts commit one by one, each with its files.
        self._context = tensorstore.Context(CONTEXT)
        self._transaction = tensorstore.Transaction()
        self._pending_bytes = 0

    def write(self, name: str, source: TensorSource) -> str:
        """Writes a tensor; returns its checksum."""
        size, axis = source.shape[source.axis], source.axis
        row_bytes = math.prod(source.shape) * source.dtype.itemsize // size
        step = min(size, max(1, CHUNK_BYTES // row_bytes))
        chunks = [*source.shape]
        chunks[axis] = step
        bfloat16 = source.dtype == jnp.bfloat16
        metadata = {
            "shape": list(source.shape),
            "chunks": chunks,
            "dtype": "bfloat16" if bfloat16 else source.dtype.str,
            "compressor": {"id": "zstd", "level": 1},
        }
        specification = {
            **_specification(self._path, name),
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
        }
        store = self._open({**specification, "create": True})
        array = source.load()
        for start in range(0, size, step):
            if self._pending_bytes >= COMMIT_BYTES:
                self.commit()
                store = self._open({**specification, "open": True})
            index = (*(slice(None),) * axis, slice(start, min(start + step, size)))
            self._wait(store[index].write(array[index]))
            self._pending_bytes += array[index].nbytes
        return crc32(array)

    def _open(self, specification: dict[str, Any]) -> Any:
        future = tensorstore.open(
            specification, context=self._context, transaction=self._transaction
        )
        return self._wait(future)

    def commit(self) -> None:
        self._wait(self._transaction.commit_async())
        self._transaction = tensorstore.Transaction()
        self._pending_bytes = 0

    @staticmethod
    def _wait(future: Any) -> Any:
        try:
            return future.result()
        except ValueError as error:
            raise OSError(str(error).split(" [")[0]) from error
