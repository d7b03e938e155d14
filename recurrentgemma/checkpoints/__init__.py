"""Checkpoints: `load`, `save` and `convert`, for every layout in `FORMATS`.

Nothing is ever in memory twice: the model is described without being allocated, and its
tensors are read slice by slice into the dtype and onto the devices they are meant for.

What is seen of damage, when a model is loaded or converted:

- A changed weight in any file that was written here: each layout has the CRC-32 of each
  tensor, compared as the tensor is read.
- A changed weight in a .pt file of PyTorch, whose ZIP records have a CRC-32 (unless
  PyTorch was told to leave it out).
- A changed byte in the cache of Hugging Face's library, which names files by their hash.
- In every layout: truncated files; tensors that are missing, have the wrong shape,
  overlap or leave gaps; a warning of values that are not finite.

What cannot be seen: a changed weight in safetensors of other programs outside of that
cache, and in an Orbax directory of other programs. Orbax protects the index of its
store, not the values: of single changed bits in its files about one in five was refused,
and half changed weights without a word. Where a load reads only a part of a tensor, on
one of several processes, its checksum is not compared. config.json and tokenizer.model
have no checksum outside of the cache.
"""

from recurrentgemma.checkpoints.converting import Conversion, convert
from recurrentgemma.checkpoints.formats import FORMATS, detect_format
from recurrentgemma.checkpoints.loading import (
    Checkpoint,
    find_checkpoint,
    load,
    open_checkpoint,
    read_config,
)
from recurrentgemma.checkpoints.parameters import named_parameters, parameter_dtype
from recurrentgemma.checkpoints.saving import save

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Conversion",
    "convert",
    "detect_format",
    "find_checkpoint",
    "load",
    "named_parameters",
    "open_checkpoint",
    "parameter_dtype",
    "read_config",
    "save",
]
