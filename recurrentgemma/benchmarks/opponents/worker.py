"""The coordinator's handle on a worker process (see `serve.py`)."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).resolve().parent
PACKAGE_ROOT = HERE.parents[2]
NOT_INHERITED = "PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"
"""What would show a worker this package, or change what is measured."""


LAST_WORDS = 2000
"""Characters of a dead worker's log that the error shows."""


class WorkerError(RuntimeError):
    """The worker answered with an error, or died."""


class Worker:
    """One opponent in a process of its own.

    Args:
      name: The opponent's file in this folder, without its suffix.
      python: Interpreter of the opponent's environment.
      directory: What `checkpoint.write` made.

    The process starts in an empty directory: from this repository's root the name
    `recurrentgemma` would mean this package, and `kernels` a package that
    transformers looks for.
    """

    def __init__(self, name: str, python: str, directory: Path):
        self.name = name
        self.peak_bytes: int | None = None
        self._scratch = tempfile.TemporaryDirectory()
        self._log = Path(directory) / f"{name}.log"
        environment = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
        environment |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        if name == "ours":
            environment["PYTHONPATH"] = str(PACKAGE_ROOT)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [python, "-P", HERE / "serve.py", HERE / f"{name}.py", directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._scratch.name,
                env=environment,
                text=True,
            )

    def ask(self, command: str, **arguments: Any) -> Any:
        """Runs a command and waits; `peak_bytes` then holds its peak memory.

        Raises:
          WorkerError: The command failed, or the process is gone.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            request = json.dumps({"command": command, **arguments})
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise WorkerError(
                f"{self.name} died with {code}; it wrote:\n{self._last_words()}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name} {command} {arguments}: {reply['error']}")
        self.peak_bytes = reply["peak_bytes"]
        return reply["result"]

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-LAST_WORDS:]

    def close(self) -> None:
        self._process.communicate()  # closes its input, which ends it
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
