"""State dicts of PyTorch, read and written a slice at a time, without PyTorch.

A file is a ZIP archive without compression. `data.pkl` is a pickle that builds the
dictionary; `data/{key}` holds the bytes of a storage. The pickle is read by an unpickler
that knows only the names in `_NAMES`, and nothing else in it is run. ZIP records are
padded so that their data is aligned, as PyTorch needs to map a file into memory.
"""

import functools
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from recurrentgemma.checkpoints.checksums import (
    check_crc,
    checked_before,
    verified,
)
from recurrentgemma.checkpoints.tensors import TensorSource, blocks_of, file_source

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "DoubleStorage": np.dtype(np.float64),
}
"""Dtypes of parameters by PyTorch's name of their storage."""
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
OTHER_STORAGES = (
    *("Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat", "ComplexDouble"),
)
MAX_PICKLE_BYTES = 100_000_000
LOCAL_HEADER_BYTES = 30
"""Size of the fixed part of a local header, which ends with the lengths of the name and
of the extra fields."""
ZIP64_EXTRA_BYTES = 20
EXTRA_HEADER_BYTES = 4
RECORD_ALIGNMENT = 64


class _Storage(NamedTuple):
    dtype: np.dtype | str
    key: str
    size: int
    """Number of entries."""


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Archive(NamedTuple):
    path: Path
    folder: str
    """What the names of all records begin with."""
    records: Mapping[str, zipfile.ZipInfo]
    checks: dict[str, Callable[[], None]]
    """Comparisons of whole records with their checksums, by name; each reads once."""

    def data_offset(self, record: zipfile.ZipInfo) -> int:
        """Where the data of a record begins in the file."""
        with self.path.open("rb") as file:
            file.seek(record.header_offset)
            header = file.read(LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", header[-4:])
        return record.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes

    def check(self, record: zipfile.ZipInfo) -> Callable[[], None]:
        """A function that compares a record with its checksum when it is first called."""
        check = functools.partial(
            check_crc,
            self.path,
            self.data_offset(record),
            record.file_size,
            record.CRC,
            f"{self.path}: {record.filename}",
        )
        return self.checks.setdefault(record.filename, functools.cache(check))


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch", f"{name}Storage"): name.lower() for name in OTHER_STORAGES},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, size = pid
        return _Storage(dtype, key, size)


def read_state_dict(
    path: Path, slicing_axis: Callable[[str, tuple[int, ...]], int]
) -> dict[str, TensorSource]:
    """The tensors of a file; their data is not read now.

    Args:
      path: the file.
      slicing_axis: the axis along which to read a tensor, by its name and shape.

    Raises:
      ValueError: the file is missing, damaged, no state dict, or holds a tensor that no
        parameter is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: info for info in archive.infolist()}
            [pickled] = [name for name in records if name.endswith("/data.pkl")]
            folder = pickled.removesuffix("data.pkl")
            if records[pickled].file_size > MAX_PICKLE_BYTES:
                raise ValueError("its pickle is too large")
            order = f"{folder}byteorder"
            if order in records and archive.read(order) != b"little":
                raise ValueError("it is big-endian")
            # Read whole, which compares its checksum.
            state = _Unpickler(io.BytesIO(archive.read(pickled))).load()
        if not isinstance(state, Mapping) or not state:
            raise ValueError("it holds no dictionary of tensors")
        opened = _Archive(path, folder, records, {})
        return {
            name: _source(opened, name, tensor, slicing_axis)
            for name, tensor in state.items()
        }
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    except Exception as error:  # Damage can make unpickling raise anything.
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(
            f"{path} is not a PyTorch state dict, or is damaged: {reason}."
        ) from error


def _source(
    archive: _Archive,
    name: Any,
    tensor: Any,
    slicing_axis: Callable[[str, tuple[int, ...]], int],
) -> TensorSource:
    if not isinstance(name, str) or not isinstance(tensor, _Tensor):
        raise ValueError(f"{name!r} is not a tensor")  # noqa: TRY004
    storage, first, shape, strides = tensor
    dtype = storage.dtype
    if not isinstance(dtype, np.dtype):
        raise ValueError(f"{name} is stored as {dtype}")  # noqa: TRY004
    transposed = len(shape) == 2 and _is_contiguous(shape[::-1], strides[::-1])
    if not transposed and not _is_contiguous(shape, strides):
        raise ValueError(f"{name} is stored with the strides {strides}")
    record = archive.records[f"{archive.folder}data/{storage.key}"]
    size = math.prod(shape)
    data_bytes = (first + size) * dtype.itemsize
    if first < 0 or record.compress_type or data_bytes > record.file_size:
        raise ValueError(f"{name} has no place in it")
    offset = archive.data_offset(record) + first * dtype.itemsize
    axis = 0 if transposed else slicing_axis(name, shape)
    stored_shape = shape[::-1] if transposed else shape
    source = file_source(archive.path, offset, stored_shape, dtype, axis)
    is_whole_record = data_bytes == size * dtype.itemsize == record.file_size
    if not record.CRC:  # PyTorch can be told to leave it out.
        pass
    elif is_whole_record:
        source = verified(source, f"{record.CRC:08x}", f"{archive.path}: {name}")
    else:
        source = checked_before(source, archive.check(record))
    return source.transposed() if transposed else source


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size < 1 or (size > 1 and stride != expected):
            return False
        expected *= size
    return True


def write_state_dict(path: Path, tensors: Mapping[str, TensorSource]) -> None:
    """Writes a file that `torch.load` reads, one tensor at a time.

    Args:
      path: the file, which must not exist.
      tensors: by name.

    Raises:
      OSError: the file cannot be written.
    """
    with zipfile.ZipFile(path, "x") as archive:
        _write_record(archive, f"{path.stem}/data.pkl", [_pickle(tensors)])
        _write_record(archive, f"{path.stem}/byteorder", [b"little"])
        for key, source in enumerate(tensors.values()):
            blocks = blocks_of(source.load())
            _write_record(archive, f"{path.stem}/data/{key}", blocks)
        _write_record(archive, f"{path.stem}/version", [b"3\n"])


def _write_record(archive: zipfile.ZipFile, name: str, blocks: Iterable) -> None:
    record = zipfile.ZipInfo(name)
    assert archive.fp is not None
    fixed = LOCAL_HEADER_BYTES + ZIP64_EXTRA_BYTES + EXTRA_HEADER_BYTES
    padding = -(archive.fp.tell() + fixed + len(name)) % RECORD_ALIGNMENT
    record.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(record, "w", force_zip64=True) as file:
        for block in blocks:
            file.write(block)


def _pickle(tensors: Mapping[str, TensorSource]) -> bytes:
    """A pickle of {name: tensor} that calls PyTorch's functions by their names."""
    parts = [pickle.PROTO + b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, source) in enumerate(tensors.items()):
        strides = np.cumprod([1, *source.shape[:0:-1]])[::-1].tolist()
        parts += [
            _plain(name),
            _global("torch._utils", "_rebuild_tensor_v2"),
            pickle.MARK,
            pickle.MARK,
            _plain("storage"),
            _global("torch", STORAGE_NAMES[source.dtype]),
            _plain(str(key)),
            _plain("cpu"),
            _plain(math.prod(source.shape)),
            pickle.TUPLE,
            pickle.BINPERSID,
            _plain(0),
            _plain(tuple(source.shape)),
            _plain(tuple(strides)),
            _plain(False),
            _global("collections", "OrderedDict"),
            pickle.EMPTY_TUPLE,
            pickle.REDUCE,
            pickle.TUPLE,
            pickle.REDUCE,
        ]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _plain(value: Any) -> bytes:
    """The part of a pickle that puts a value of Python's own on the stack."""
    return pickle.dumps(value, protocol=2)[2:-1]
