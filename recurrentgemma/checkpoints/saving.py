"""`save`: from a model to a checkpoint directory."""

import os
from collections.abc import Mapping
from pathlib import Path

from recurrentgemma import _validation as check
from recurrentgemma._atomic import replace_directory, resolve
from recurrentgemma.checkpoints.formats import FORMATS, detect_format
from recurrentgemma.checkpoints.parameters import (
    check_tokenizer,
    parameter_values,
    tensors_of,
)
from recurrentgemma.checkpoints.stored import WRITER, WRITER_KEY, read_config_json
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig
from recurrentgemma.griffin import Griffin
from recurrentgemma.matrices import LowRank, Quantized
from recurrentgemma.tokenizer import Tokenizer

QUANTIZED_FORMAT = "native"
"""The layout that holds quantised matrices."""


def save(
    path: str | os.PathLike[str],
    model: Griffin,
    tokenizer: Tokenizer | None,
    *,
    format: str = "native",
) -> None:
    """Writes a checkpoint directory, whole or not at all.

    Parameters keep their dtypes. An existing directory is replaced only if it is a
    checkpoint that `save` wrote and holds only files of its layout.

    Args:
      path: the directory to make; missing parents are made.
      model: the model; layers that are stacked for training are written one by one.
      tokenizer: its tokenizer, or None to write none.
      format: a name in `FORMATS`.

    Raises:
      ValueError: the format is unknown or cannot hold this model, the model is edited
        or has adapters, the tokenizer does not fit, the directory holds something else,
        or writing failed. What was there is as it was.
    """
    check.instance("model", model, Griffin, "a Griffin model")
    if model.observer is not None and model.observer.key:
        raise ValueError(
            "model: expected one without edits, got an edited one, whose functions no "
            "checkpoint holds; save inspect.with_observer(model, None)"
        )
    kinds = {type(value) for value in parameter_values(model).values()}
    if LowRank in kinds:
        raise ValueError(
            "model: expected one without adapters, got an adapted one; save "
            "adapters.merge_adapters(model), or the adapters alone with "
            "adapters.save_adapters"
        )
    if Quantized in kinds and format != QUANTIZED_FORMAT:
        raise ValueError(
            f"format: expected {QUANTIZED_FORMAT!r}, which alone holds quantised "
            f"matrices, got {format!r}; load the model without quantize="
        )
    if tokenizer is not None:
        check.instance("tokenizer", tokenizer, Tokenizer, "a Tokenizer or None")
    write_checkpoint(path, format, model.config, tensors_of(model), tokenizer)


def write_checkpoint(
    path: str | os.PathLike[str],
    format: str,
    config: GriffinConfig,
    tensors: Mapping[str, TensorSource],
    tokenizer: Tokenizer | None,
) -> None:
    """As `save`, from tensors by native name."""
    check.choice("format", format, FORMATS)
    path = check.path("path", path)
    check_tokenizer(config, tokenizer)
    try:
        target = resolve(path)
        _check_replaceable(target)
        with replace_directory(target) as partial:
            FORMATS[format].write(partial, config, tensors, tokenizer)
    except OSError as error:
        raise ValueError(
            f"Could not save to {path}: {error.strerror or error}. Nothing was written."
        ) from error


def _check_replaceable(path: Path) -> None:
    """Refuses to replace anything but an earlier save."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; expected a directory to save to.")
    if path == Path.cwd():
        raise ValueError(
            f"{path} is the current directory, which cannot be replaced: save to a new "
            "directory."
        )
    if not any(path.iterdir()):
        return
    writer = str((read_config_json(path) or {}).get(WRITER_KEY, ""))
    if writer.split(" ")[0] != WRITER.split(" ")[0]:
        raise ValueError(
            f"{path} holds files that this package did not write: save to a new "
            "directory."
        )
    written = FORMATS[detect_format(path)].FILES
    others = [
        name
        for file in path.rglob("*")
        if not written.fullmatch(name := file.relative_to(path).as_posix())
    ]
    if others:
        raise ValueError(
            f"{path} holds other files ({', '.join(sorted(others)[:5])}): save to a "
            "new directory."
        )
