"""The coordinator's handle on a worker process (see `serve.py`)."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
OTHER_PACKAGES = "official", "transformers"
NOT_INHERITED = "PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"
"""What would show a worker this package, or change what is measured."""
LAST_WORDS = 2000
"""Characters of a dead worker's log that the error shows."""


class WorkerError(RuntimeError):
    """The worker answered with an error, or died."""


class Worker:
    """One opponent in a separate process.

    Args:
      name: One of `OTHER_PACKAGES`, or any other name for this package.
      python: Interpreter of the opponent's environment.
      directory: What `checkpoint.write` made.
      checkout: Root of the repository whose files the process runs.

    The process starts in an empty directory: from this repository's root the name
    `recurrentgemma` would mean this package, and `kernels` a package that
    transformers looks for.
    """

    def __init__(self, name: str, python: str, directory: Path, checkout: Path = ROOT):
        self.name = name
        self.peak_bytes: int | None = None
        self._log = Path(directory) / f"{name}.log"
        here = checkout.absolute() / HERE.relative_to(ROOT)
        self._environment = {
            key: value for key, value in os.environ.items() if key not in NOT_INHERITED
        } | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        script = f"{name}.py"
        if name not in OTHER_PACKAGES:
            script = "ours.py"
            self._environment["PYTHONPATH"] = str(checkout.absolute())
        self._command = [python, "-P", here / "serve.py", here / script, directory]
        self._start()

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._scratch.name,
                env=self._environment,
                text=True,
            )

    def restart(self) -> None:
        """Ends the process and starts a new one, which has compiled nothing."""
        self.close()
        self._start()

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
            words = self._log.read_text(errors="replace")[-LAST_WORDS:]
            raise WorkerError(f"{self.name} died with {code}; it wrote:\n{words}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name} {command} {arguments}: {reply['error']}")
        self.peak_bytes = reply["peak_bytes"]
        return reply["result"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()  # closes its input, which ends it
        self._scratch.cleanup()
