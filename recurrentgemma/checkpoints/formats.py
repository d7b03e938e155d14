"""The table of checkpoint layouts."""

from pathlib import Path

from recurrentgemma.checkpoints import (
    hugging_face,
    native,
    official_flax,
    official_pytorch,
)
from recurrentgemma.checkpoints.stored import Format

FORMATS: dict[str, Format] = {
    "native": native,
    "hugging_face": hugging_face,
    "official_flax": official_flax,
    "official_pytorch": official_pytorch,
}
"""Checkpoint layouts by name, in the order in which they are tried."""


def detect_format(path: Path) -> str:
    """The name of the layout that a checkpoint directory has.

    Raises:
      ValueError: it has none of them.
    """
    for name, layout in FORMATS.items():
        if layout.detect(path):
            return name
    raise ValueError(
        f"{path} is not a checkpoint in any of the layouts {', '.join(FORMATS)}."
    )
