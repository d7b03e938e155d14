"""Checkpoints: `load`, `save` and `convert`, for every layout in `FORMATS`.

Nothing is ever in memory twice: the model is described without being allocated, and its
tensors are read slice by slice into the dtype and onto the devices they are meant for.
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
