"""Answers of a model in a file, so that an interrupted evaluation goes on.

A line is `{"key": "0d5f..", "value": ..}`. The key is a digest of all that the answer
depends on: the model, the tokenizer, the request. One file serves any number of models
and tasks. A line that was cut off is dropped; any other content is refused.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from recurrentgemma import _validation as check
from recurrentgemma._atomic import LockedError, lock

_LINE_START = b'{"key": '
_DIGEST_LENGTH = 32


def digest_of(*parts: Any) -> str:
    """A digest of values that JSON can write."""
    data = json.dumps(parts, separators=(",", ":"), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:_DIGEST_LENGTH]


class AnswerCache:
    """The answers of a file, which this process alone extends; a context manager.

    Example:
      >>> from recurrentgemma.evaluation.scorer import Scorer
      >>> with AnswerCache("answers.jsonl") as cache:
      ...     scorer = Scorer(sampler, cache=cache)

    Args:
      path: the file, which is made if there is none; None keeps answers in memory.

    Raises:
      ValueError: the file holds something else, or another process extends it.
      OSError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self._values: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        path = check.path("cache", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        try:
            lock(self._file.fileno())
            self._values = _read(path)
        except LockedError as error:
            self._file.close()
            raise ValueError(
                f"cache: expected a file that no other evaluation writes, got {path}; "
                "wait for that one, or give another file"
            ) from error
        except ValueError:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, answers: Sequence[tuple[str, Any]]) -> None:
        """Adds answers by key, and writes them to the file."""
        self._values |= dict(answers)
        if self._file is not None:
            for key, value in answers:
                line = json.dumps({"key": key, "value": value})
                self._file.write(line.encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _read(path: Path) -> dict[str, Any]:
    """The answers of a file; a last line that was cut off is removed."""
    values, size = {}, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start = line[: len(_LINE_START)]
            if not line.endswith(b"\n") and _LINE_START.startswith(start):
                os.truncate(path, size)
                break
            try:
                record = json.loads(line)
                values[record["key"]] = record["value"]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(
                    f"cache: expected a file of answers, got {path}, line {number}: "
                    "another content; give another file, or remove this one"
                ) from error
            size += len(line)
    return values
