"""Files that a run adds rows to: lines of JSON, and TensorBoard's.

Rows of steps that are about to be done again, after a restart, go first.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

MEMORY = "memory_tokens_histogram"
"""The entry of a row that TensorBoard gets as histograms instead."""


class JsonLines:
    """A JSON object a line, each with the `step` it is of.

    Args:
      path: the file; its directory exists.
      first_step: steps done so far; lines of later ones go.
    """

    def __init__(self, path: Path, first_step: int):
        self._path = path
        self._file = path.open("a+b")
        self._file.seek(0)
        kept = 0
        for line in self._file:
            # A line that a killed process began has no newline.
            if not line.endswith(b"\n") or json.loads(line)["step"] > first_step:
                break
            kept += len(line)
        self._file.truncate(kept)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row; a number that is not finite becomes null.

        Raises:
          OSError: it could not be written.
        """
        line = json.dumps(_finite(row), allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"could not write to {self._path}: {error.strerror}; the run resumes "
                "from its newest training state"
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of `JsonLines`."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """The same rows for TensorBoard.

    Args:
      folder: made if it does not exist.
      first_step: steps done so far.

    Raises:
      ValueError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, first_step: int):
        try:
            from tensorboardX import (  # pyright: ignore[reportMissingImports]
                SummaryWriter,
            )
        except ImportError as error:
            raise ValueError(
                "tensorboard: expected tensorboardX, which is not installed; "
                "pip install 'recurrentgemma[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Adds the numbers of a row; those of a group share a chart's name."""
        for name, value in row.items():
            if name in ("step", MEMORY):
                continue
            group = value if isinstance(value, dict) else {"": value}
            for part, number in group.items():
                if isinstance(number, int | float):
                    tag = f"{name}/{part}" if part else name
                    self._writer.add_scalar(tag, number, row["step"])

    def write_memories(self, memories: dict[str, np.ndarray], step: int) -> None:
        """Adds a histogram of the memory lengths of each layer, in powers of two."""
        for layer, lengths in memories.items():
            values = np.log2(lengths)
            self._writer.add_histogram(f"log2_memory_tokens/{layer}", values, step)

    def write_text(self, text: str, step: int) -> None:
        """Adds a sample."""
        self._writer.add_text("sample", text, step)

    def close(self) -> None:
        """Writes what is not written yet."""
        self._writer.close()
