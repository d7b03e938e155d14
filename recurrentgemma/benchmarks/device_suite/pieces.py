"""A piece of the device suite: what it is called, what it does, and how it can end."""

import dataclasses
import re
import time
from collections.abc import Callable

import jax

from recurrentgemma.benchmarks.report import Row

KEY = ("kind", "program", "implementation", "dtype")
"""What tells pieces apart; "default" is the implementation that runs without a name."""
DEFAULT = "default"
COPY = "copy"
"""Program that all bandwidths are compared with."""
RIGHT, DONE = "right", "done"
WRONG, FAILED = "WRONG", "FAILED"
NOT_HERE, OUT_OF_MEMORY = "not here", "out of memory"
CRASHED, TIME_LIMIT = "CRASHED", "time limit"
LONGEST_MESSAGE = 4000
"""Characters of an error that a row keeps: its beginning."""
LONGEST_REMARK = 160


class Wrong(Exception):
    """A result is not what it should be; `row` has the figures."""

    def __init__(self, message: str, row: Row):
        super().__init__(message)
        self.row = row


@dataclasses.dataclass(frozen=True)
class Piece:
    """Something that is checked or timed, on its own."""

    kind: str
    """"check", "time" or "model"."""
    program: str
    implementation: str
    dtype: str
    work: Callable[[], Row]
    """Gives the figures of the row; raises `Wrong`, or whatever goes wrong."""
    limit_s: float = 90.0
    """Seconds after which it is given up."""

    @property
    def key(self) -> Row:
        """Values of `KEY`."""
        return {name: getattr(self, name) for name in KEY}

    def run(self) -> tuple[Row, bool]:
        """Does the work.

        Returns:
          The row without its key: `status`, figures, and a `remark` and `message` if
          something went wrong. And whether the process can go on: after an error of the
          device, what comes next might fail too.
        """
        start = time.perf_counter()
        healthy = True
        try:
            row = {"status": RIGHT if self.kind == "check" else DONE} | self.work()
        except Wrong as error:
            row = error.row | failure(WRONG, str(error))
        except Exception as error:  # noqa: BLE001 - whatever a device comes up with
            row = _error_row(error)
            healthy = not isinstance(error, jax.errors.JaxRuntimeError)
        return row | {"seconds": time.perf_counter() - start}, healthy


def _error_row(error: Exception) -> Row:
    text = str(error)
    refused = re.search(" cannot run: (.*);", text)
    if isinstance(error, NotImplementedError) and refused:
        return failure(NOT_HERE, refused[1])
    status = OUT_OF_MEMORY if _is_out_of_memory(error) else FAILED
    return failure(status, f"{type(error).__name__}: {text}".strip())


def _is_out_of_memory(error: Exception) -> bool:
    # As XLA and `models.OutOfMemory` say it.
    said = re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error))
    return bool(said) or isinstance(error, MemoryError)


def failure(status: str, message: str) -> Row:
    """The row of a piece without figures."""
    first = message.split("\n")[0][:LONGEST_REMARK]
    return {"status": status, "remark": first, "message": message[:LONGEST_MESSAGE]}
