"""The process that runs the pieces of the device suite, one after the other.

A piece may end its process, or never end. Then the coordinator, which uses no device,
starts another process for the pieces after it.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recurrentgemma.benchmarks.device_suite.pieces import (
    CRASHED,
    TIME_LIMIT,
    Piece,
    failure,
)
from recurrentgemma.benchmarks.report import Row

Make = Callable[[], tuple[Row, Sequence[Piece]]]
"""Gives facts of the device and the pieces; runs in the worker."""
START_LIMIT_S = 300.0
"""A TPU that another process holds is waited for."""
END_LIMIT_S = 5.0
LAST_WORDS = 2000
"""Characters of a dead worker's log that its row shows."""


class WorkerError(RuntimeError):
    """The process could not start."""


class _Ended(Exception):
    """The process is gone: the status of the piece that it ran, and what happened."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


class Worker:
    """A process that is replaced when it ends.

    Args:
      make: what it runs; other processes can import it.
      log: file of what the process writes, its last words among it.

    Raises:
      WorkerError: it could not start.
    """

    def __init__(self, make: Make, log: Path):
        self._make, self._log = make, log
        self._log.write_bytes(b"")
        self._connection: Any = None
        self.facts, self.pieces = self._start()

    def _start(self) -> tuple[Row, list[tuple[Row, float]]]:
        """Facts of the device, and the key and the time limit of every piece."""
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._written = self._log.stat().st_size
        self._process = context.Process(
            target=_serve, args=(other, self._make, str(self._log)), daemon=True
        )
        self._process.start()
        other.close()
        try:
            return self._receive(START_LIMIT_S)
        except _Ended as error:
            raise WorkerError(f"the process that uses the device {error}") from error

    def run(self, index: int, limit_s: float) -> Row:
        """The row of a piece, without its key.

        Args:
          index: of the piece.
          limit_s: seconds after which the process is ended.

        Raises:
          WorkerError: the process had ended, and another one could not start.
        """
        if self._connection is None:
            self._start()
        try:
            row, healthy = self._receive(limit_s, index)
        except _Ended as error:
            return failure(error.status, f"the process {error}")
        if not healthy:
            self.close()
        return row

    def _receive(self, limit_s: float, *request: int) -> Any:
        """What the process sends, after a request if there is one."""
        assert self._connection is not None
        try:
            for index in request:
                self._connection.send(index)
            if self._connection.poll(limit_s):
                return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(END_LIMIT_S)
            code = self._process.exitcode
            self.close()
            by = signal.Signals(-code).name if code and code < 0 else f"status {code}"
            raise _Ended(CRASHED, f"ended with {by}\n{self._last_words()}") from None
        self._process.kill()
        self.close()
        raise _Ended(TIME_LIMIT, f"took more than {limit_s:g} s")

    def _last_words(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._written)
            return log.read().decode(errors="replace")[-LAST_WORDS:].strip()

    def close(self) -> None:
        """Ends the process."""
        if self._connection is None:
            return
        self._connection.close()  # which ends it, unless it is at work
        self._connection = None
        self._process.join(END_LIMIT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Any, make: Make, log: str) -> None:
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    facts, pieces = make()
    connection.send((facts, [(piece.key, piece.limit_s) for piece in pieces]))
    while True:
        try:
            index = connection.recv()
        except EOFError:
            return
        connection.send(pieces[index].run())
