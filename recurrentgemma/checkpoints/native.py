"""The package's own layout: config.json, model.safetensors, tokenizer.model.

Tensors have the names and the orientation of the model's parameters.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from recurrentgemma.checkpoints.safetensors_file import (
    read_safetensors,
    write_safetensors,
)
from recurrentgemma.checkpoints.stored import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    WRITER,
    WRITER_KEY,
    Stored,
    config_of,
    find_tokenizer,
    read_config_json,
    write_json,
    write_tokenizer,
)
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig
from recurrentgemma.tokenizer import Tokenizer

FORMAT_NAME = "recurrentgemma"
FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
FILES = re.compile(r"config\.json|tokenizer\.model|model\.safetensors")


def detect(path: Path) -> bool:
    """Whether config.json says so."""
    return (read_config_json(path) or {}).get("format") == FORMAT_NAME


def read(path: Path) -> Stored:
    """The checkpoint; raises ValueError if it is damaged or of a newer version."""
    content = read_config_json(path) or {}
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}; this version of the package reads "
            f"{FORMAT_VERSION}. A newer one may read it."
        )
    return Stored(
        config=config_of(path, content),
        tensors=read_safetensors(path / MODEL_FILE),
        tokenizer_path=find_tokenizer(path),
        stored_name=lambda name: name,
        files=[path / name for name in (CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE)],
    )


def write(
    path: Path,
    config: GriffinConfig,
    tensors: Mapping[str, TensorSource],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes into an empty directory."""
    content = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        WRITER_KEY: WRITER,
        "config": config.to_dict(),
    }
    write_json(path / CONFIG_FILE, content)
    write_safetensors(path / MODEL_FILE, tensors, {"format": "np"})
    write_tokenizer(path, tokenizer)
