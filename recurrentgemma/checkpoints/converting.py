"""`convert`: from one layout to another, tensor by tensor, without making the model."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.checkpoints.formats import FORMATS
from recurrentgemma.checkpoints.loading import (
    check_tensors,
    choose_tokenizer,
    open_checkpoint,
)
from recurrentgemma.checkpoints.parameters import parameter_shapes
from recurrentgemma.checkpoints.saving import write_checkpoint
from recurrentgemma.checkpoints.tensors import floating_dtype
from recurrentgemma.config import GriffinConfig
from recurrentgemma.tokenizer import Tokenizer


class ConvertedTensor(NamedTuple):
    """What became of a tensor."""

    name: str
    """The native one."""
    source_name: str
    target_name: str
    shape: tuple[int, ...]
    """In native orientation."""
    source_dtype: np.dtype
    dtype: np.dtype
    """As written."""


class Conversion(NamedTuple):
    """The report of a conversion."""

    source_format: str
    target_format: str
    tensors: list[ConvertedTensor]
    has_tokenizer: bool


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str,
    config: GriffinConfig | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | bytes | None = None,
    dtype: Any = None,
) -> Conversion:
    """Writes the checkpoint `source` in another layout, whole or not at all.

    Args:
      source: what `load` takes.
      target: the directory to make, as for `save`.
      format: a name in `FORMATS`.
      config: the architecture, as for `load`.
      tokenizer: the tokenizer, as for `load`.
      dtype: the dtype of all tensors, one of bfloat16, float16, float32 and float64;
        None keeps the dtype of each.

    Returns:
      What was mapped to what, read back from the written checkpoint.

    Raises:
      ValueError: as for `load` and `save`, or values are too large for `dtype`; what
        was at `target` is as it was.
    """
    if dtype is not None:
        dtype = floating_dtype(dtype, "dtype")
    checkpoint = open_checkpoint(source, config)
    stored, config = checkpoint.stored, checkpoint.config
    shapes = parameter_shapes(config)
    check_tensors(checkpoint, shapes)
    tensors = {name: stored.tensors[name] for name in shapes}
    if dtype is not None:
        tensors = {name: tensors[name].astype(dtype, name) for name in tensors}
    chosen = choose_tokenizer(tokenizer, stored)
    write_checkpoint(target, format, config, tensors, chosen)
    written = FORMATS[format].read(Path(target))
    converted = [
        ConvertedTensor(
            name,
            stored.stored_name(name),
            written.stored_name(name),
            shape,
            stored.tensors[name].dtype,
            written.tensors[name].dtype,
        )
        for name, shape in shapes.items()
    ]
    return Conversion(checkpoint.layout, format, converted, chosen is not None)
