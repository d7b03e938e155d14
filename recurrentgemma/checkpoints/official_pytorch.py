"""The released PyTorch layout: one file, a state dict that torch saved.

PyTorch itself reads the file (weights only: nothing in it is run) and writes its frame;
it is needed for this layout alone. Tensors go in and out slice by slice: PyTorch maps
the file into memory, and it is mapped anew before much of it has become memory of the
process.
"""

import importlib
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from recurrentgemma.checkpoints.official import (
    slicing_axis,
    to_stored_name,
    with_other_files,
    write_other_files,
)
from recurrentgemma.checkpoints.safetensors_file import DTYPES
from recurrentgemma.checkpoints.stored import Stored
from recurrentgemma.checkpoints.tensors import TensorSource, blocks_of
from recurrentgemma.config import GriffinConfig
from recurrentgemma.tokenizer import Tokenizer

MODEL_FILE = "model.pt"
SUFFIXES = (".pt", ".pth")
MAX_MAPPED_BYTES = 1 << 24
DTYPES_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
ZIP_HEADER_BYTES = 30
"""Size of the fixed part of a local header, whose last four bytes are two lengths."""


def detect(path: Path) -> bool:
    """Whether this is a .pt file or a directory with one."""
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    return sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)


def _import_torch() -> Any:
    try:
        torch = importlib.import_module("torch")
        if not hasattr(torch.serialization, "skip_data"):
            raise ImportError("an older version")
        return torch
    except ImportError as error:
        raise ValueError(
            "The official_pytorch layout needs PyTorch 2.5 or later: pip install torch."
        ) from error


def read(path: Path) -> Stored:
    """The checkpoint.

    Raises:
      ValueError: PyTorch is missing, there are several files, or the file is not a
        state dict.
    """
    files = _files(path)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds several state dicts ({names}): pass one file.")
    file, folder = files[0], files[0].parent
    mapped = _MappedFile(file)
    tensors = {}
    for name, source in mapped.sources().items():
        official, transposed = _to_official_name(name, len(source.shape))
        tensors[official] = source.transposed() if transposed else source
    return with_other_files(
        folder, tensors, lambda name: _from_official_name(to_stored_name(name))
    )


def _to_official_name(name: str, rank: int) -> tuple[str, bool]:
    if not name.endswith(".weight"):
        return name, False
    return name.removesuffix("weight") + "kernel", rank == 2


def _from_official_name(name: str) -> str:
    stem = name.removesuffix(".kernel")
    return name if stem == name else f"{stem}.weight"


class _MappedFile:
    """A state dict whose file is mapped into memory, a part of it at a time."""

    def __init__(self, path: Path):
        self._torch = _import_torch()
        self._path = path
        self._tensors: dict[str, Any] = {}
        self._read_bytes = 0

    def sources(self) -> dict[str, TensorSource]:
        self._map()
        return {name: self._source(name) for name in self._tensors}

    def _map(self) -> None:
        self._tensors = {}
        try:
            loaded = self._torch.load(
                self._path, map_location="cpu", weights_only=True, mmap=True
            )
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(f"Cannot read {self._path}: {error.strerror}.") from error
        except (
            OSError,
            RuntimeError,
            ValueError,
            LookupError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(
                f"{self._path} is not a PyTorch state dict, or is truncated: the "
                "weights-only loader refused it."
            ) from error
        is_tensor = self._torch.is_tensor
        if not isinstance(loaded, Mapping) or not loaded:
            raise ValueError(f"{self._path} is not a PyTorch state dict.")
        for name, value in loaded.items():
            if not isinstance(name, str) or not is_tensor(value):
                raise ValueError(
                    f"{self._path} is not a PyTorch state dict: {name!r} is not a "
                    "tensor."
                )
        self._tensors = dict(loaded)
        self._read_bytes = 0

    def _source(self, name: str) -> TensorSource:
        tensor = self._tensors[name]
        dtype = DTYPES_BY_NAME.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"{self._path}: {name} is stored as {tensor.dtype}.")
        shape = tuple(tensor.shape)
        axis = slicing_axis(name, shape)

        def read(start: int, stop: int) -> np.ndarray:
            if self._read_bytes > MAX_MAPPED_BYTES:
                self._map()
            part = self._tensors[name].detach().narrow(axis, start, stop - start)
            self._read_bytes += part.nbytes
            if dtype == jnp.bfloat16:
                # NumPy has no such dtype of its own.
                bits = part.contiguous().view(self._torch.int16).numpy()
                return bits.view(dtype)
            # A copy, because a view would keep the file mapped.
            return part.numpy().copy()

        return TensorSource(shape, dtype, axis, read)


def write(
    path: Path,
    config: GriffinConfig,
    tensors: Mapping[str, TensorSource],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes into an empty directory; raises ValueError if the official package has no
    such model."""
    torch = _import_torch()
    stored = {}
    for name, source in write_other_files(path, config, tensors, tokenizer).items():
        stored_name = _from_official_name(name)
        if stored_name != name and len(source.shape) == 2:
            source = source.transposed()
        stored[stored_name] = source
    _write_state_dict(torch, path / MODEL_FILE, stored)


def _write_state_dict(
    torch: Any, file: Path, tensors: Mapping[str, TensorSource]
) -> None:
    """Has PyTorch leave room for the data of each tensor, and fills it."""
    frame = {
        name: torch.empty(source.shape, dtype=getattr(torch, source.dtype.name))
        for name, source in tensors.items()
    }
    with torch.serialization.skip_data():
        torch.save(frame, file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    checksums = {}
    with file.open("r+b") as opened:
        # Storages are numbered in the order of the tensors.
        for number, source in enumerate(tensors.values()):
            name = f"{file.stem}/data/{number}"
            header = entries[name].header_offset
            opened.seek(header + ZIP_HEADER_BYTES - 4)
            lengths = [int.from_bytes(opened.read(2), "little") for _ in range(2)]
            opened.seek(header + ZIP_HEADER_BYTES + sum(lengths))
            checksums[name] = 0
            for block in blocks_of(source.load()):
                checksums[name] = zlib.crc32(block, checksums[name])
                opened.write(block)
    with zipfile.ZipFile(file, "a") as archive:
        for name, checksum in checksums.items():
            archive.getinfo(name).CRC = checksum
        archive.comment = b""  # A change, so that the directory is written again.
