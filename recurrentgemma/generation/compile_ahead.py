"""Compiles programs in a thread, beside the work that needs other programs first."""

import logging
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

_logger = logging.getLogger(__name__)


class BackgroundCompiler:
    """Programs, by key, that are compiled or being compiled in a thread."""

    def __init__(self):
        self._finished: dict[Hashable, threading.Event] = {}

    def start(self, programs: Mapping[Any, Callable[[], object]]) -> None:
        """Compiles the programs that are not known yet, in their order, in a thread.

        A failure is only logged: whoever needs the program compiles it again and gets
        the error. When the interpreter ends, it waits for one program, not for all.
        """
        new = {key: threading.Event() for key in programs if key not in self._finished}
        if not new:
            return
        self._finished |= new

        def compile_all():
            try:
                for key, finished in new.items():
                    if not threading.main_thread().is_alive():
                        break
                    programs[key]()
                    finished.set()
            except Exception:
                _logger.debug("A program was not compiled ahead.", exc_info=True)
            finally:
                for finished in new.values():
                    finished.set()

        # A daemon would be killed amid a compilation, which crashes the process.
        threading.Thread(target=compile_all, name="compile ahead").start()

    def wait(self, key: Hashable) -> None:
        """Returns when nothing compiles this program any more."""
        if finished := self._finished.get(key):
            finished.wait()

    def wait_for_all(self) -> None:
        """Returns when nothing is being compiled any more."""
        for finished in list(self._finished.values()):
            finished.wait()
