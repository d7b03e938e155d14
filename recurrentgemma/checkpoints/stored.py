"""What every checkpoint format reads and writes.

A format is a module in this folder and a line in `FORMATS`. It has a pattern and three
functions:

    FILES
    detect(path) -> bool
    read(path) -> Stored
    write(path, config, tensors, tokenizer) -> None

`path` is a directory, or for `detect` and `read` a file. `tensors` maps native names to
sources in native orientation.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from recurrentgemma import __version__
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig
from recurrentgemma.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
NOT_THIS_JSON = (ValueError, KeyError, TypeError, AttributeError)
"""Errors of content that is no JSON or lacks what is looked up in it."""
WRITER_KEY = "written_by"
"""In config.json, with `WRITER`: a checkpoint that a save may replace."""
WRITER = f"recurrentgemma {__version__}"


class Stored(NamedTuple):
    """A checkpoint whose tensors have not been read yet."""

    config: GriffinConfig | None
    """None if the layout stores none; its shapes may still tell it."""
    tensors: dict[str, TensorSource]
    """By native name; a tensor that the format does not know keeps its own."""
    tokenizer_path: Path | None
    stored_name: Callable[[str], str]
    """What the format calls the tensor of a native name."""
    files: Collection[Path]
    """What the checkpoint consists of; some of them may not exist."""


class Format(Protocol):
    """A checkpoint layout."""

    FILES: re.Pattern[str]
    """Paths, relative to the directory, of what `write` makes."""

    def detect(self, path: Path) -> bool:
        """Whether the directory or file has this layout."""
        ...

    def read(self, path: Path) -> Stored:
        """The checkpoint; raises ValueError if it is damaged or not supported."""
        ...

    def write(
        self,
        path: Path,
        config: GriffinConfig,
        tensors: Mapping[str, TensorSource],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Writes into an empty directory; raises ValueError if it cannot hold this."""
        ...


def read_config_json(path: Path) -> dict[str, Any] | None:
    """The content of the directory's config.json; None if there is none.

    Raises:
      ValueError: the file is not a JSON object.
    """
    file = path / CONFIG_FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"Cannot read {file}: {error.strerror}.") from error
    except RecursionError as error:
        raise ValueError(
            f"{file} is not a JSON object: it is nested too deeply."
        ) from (error)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}.") from error


def config_of(path: Path, content: Mapping[str, Any]) -> GriffinConfig:
    """The config in the content of the directory's config.json.

    Raises:
      ValueError: there is none, or it is not valid.
    """
    try:
        return GriffinConfig.from_dict(dict(content["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path / CONFIG_FILE} has no valid config: {error}"
        ) from error


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a readable JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(path: Path, tokenizer: Tokenizer | None) -> None:
    """Writes the tokenizer's model into the directory, if there is one."""
    if tokenizer is not None:
        (path / TOKENIZER_FILE).write_bytes(tokenizer.model_bytes)


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer's model in the directory, if there is one."""
    file = path / TOKENIZER_FILE
    return file if file.exists() else None
