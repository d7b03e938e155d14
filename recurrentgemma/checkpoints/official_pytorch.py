"""The released PyTorch layout: one file, a state dict."""

import re
from collections.abc import Mapping
from pathlib import Path

from recurrentgemma.checkpoints.official import (
    slicing_axis,
    to_stored_name,
    with_other_files,
    write_other_files,
)
from recurrentgemma.checkpoints.state_dict_file import (
    read_state_dict,
    write_state_dict,
)
from recurrentgemma.checkpoints.stored import Stored
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig
from recurrentgemma.tokenizer import Tokenizer

MODEL_FILE = "model.pt"
SUFFIXES = (".pt", ".pth")
FILES = re.compile(r"config\.json|tokenizer\.model|model\.pt")


def detect(path: Path) -> bool:
    """Whether this is a .pt file or a directory with one."""
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    return sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)


def read(path: Path) -> Stored:
    """The checkpoint.

    Raises:
      ValueError: there are several files, or the file is not a state dict.
    """
    files = _files(path)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds several state dicts ({names}): pass one file.")
    tensors = {}
    for name, source in read_state_dict(files[0], slicing_axis).items():
        official, transposed = _to_official_name(name, len(source.shape))
        tensors[official] = source.transposed() if transposed else source
    return with_other_files(
        files[0].parent,
        tensors,
        files,
        lambda name: _from_official_name(to_stored_name(name)),
    )


def _to_official_name(name: str, rank: int) -> tuple[str, bool]:
    if not name.endswith(".weight"):
        return name, False
    return name.removesuffix("weight") + "kernel", rank == 2


def _from_official_name(name: str) -> str:
    stem = name.removesuffix(".kernel")
    return name if stem == name else f"{stem}.weight"


def write(
    path: Path,
    config: GriffinConfig,
    tensors: Mapping[str, TensorSource],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes into an empty directory; raises ValueError if the official package has no
    such model."""
    stored = {}
    for name, source in write_other_files(path, config, tensors, tokenizer).items():
        stored_name = _from_official_name(name)
        if stored_name != name and len(source.shape) == 2:
            source = source.transposed()
        stored[stored_name] = source
    write_state_dict(path / MODEL_FILE, stored)
