"""Batch jobs: the prompts of a JSONL file continued into another, and resumed.

Every line of the input is an object with a "prompt". A line of the output is

    {"line": 3, "digest": "0d5f..", <fields of the input>, "text": "..",
     "num_tokens": 17, "log_prob": -20.4, "ended": true}

and is written as soon as it is finished. A log-probability that is not finite (of a model
with such weights) is null. The digest is of all that the text depends on: the input's line
and its number, the settings, the model and the tokenizer. When a job is run again, lines
with a record are left out, a record that was cut off is dropped, and an output with any
other content is refused. The seed of a line is the job's plus its number, so that a text
depends neither on the batch nor on interruptions.

The output is locked while a job runs. An input that can be read only once, such as a
pipe, is first copied to a temporary file.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma._atomic import LockedError, lock
from recurrentgemma.generation.chunk_reader import Progress
from recurrentgemma.generation.model_digest import model_digest
from recurrentgemma.generation.results import Sample
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling, check_seed

OUTPUT_FIELDS = ("line", "digest", "text", "num_tokens", "log_prob", "ended")
"""What an output line has besides the fields of its input line."""

_RECORD_START = b'{"line": '
_DIGEST_LENGTH = 16


class Line(NamedTuple):
    """A line of the input: its number, from 1, the line and what it holds."""

    number: int
    data: bytes
    fields: dict[str, Any]


class BatchJob:
    """The prompts of a file, to be continued into another file.

    Example:
      >>> job = BatchJob("prompts.jsonl", "texts.jsonl", max_new_tokens=100)
      >>> job.run(Sampler(*load("nano")), batch_size=32)
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        max_new_tokens: int = 200,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        stop: Sequence[str] = (),
    ):
        """Checks the whole input; writes nothing.

        Args:
          source: the input; a pipe is read once, here.
          target: the output, which may hold a part of the job.
          max_new_tokens: most tokens of a text.
          sampling: how tokens are chosen.
          seed: line n has the seed `seed + n`.
          stop: strings that end a text.

        Raises:
          ValueError: the input has no lines, or one without a prompt (the message
            names it); the output is a directory; a seed is out of its range.
          OSError: the input cannot be read.
        """
        self.source = check.path("source", source)
        self.target = check.path("target", target)
        self._input = self._opened()
        self.max_new_tokens = check.positive_integer("max_new_tokens", max_new_tokens)
        self.sampling = check.instance("sampling", sampling, Sampling, "a Sampling")
        self.seed = check_seed(seed)
        self.stop = check.strings("stop", stop)
        self.num_prompts = sum(1 for _ in self._lines())
        """Lines of the input."""
        if not self.num_prompts:
            raise ValueError(f"{source} is empty: expected a JSON object on each line.")
        check_seed(seed + self.num_prompts)
        if self.target.is_dir():
            raise ValueError(f"{target} is a directory; expected a file.")

    def run(
        self,
        sampler: Sampler,
        *,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> int:
        """Continues all prompts that have no record yet.

        Args:
          sampler: of the model, with a tokenizer.
          batch_size: prompts at a time; changes no text.
          progress: called with the lines finished, and all, after each.

        Returns:
          How many records were written.

        Raises:
          ValueError: the output belongs to another input, other settings or another
            model, has two records of a line, or is written by another run; it is as it
            was.
          OSError: the output cannot be written; the records in it stay valid.
        """
        check.instance("sampler", sampler, Sampler, "a Sampler")
        check.function("progress", progress)
        batch_size = check.positive_integer("batch_size", batch_size)
        digest_of = self._digests(sampler)
        with self._locked_output() as file:
            finished = self._finished(digest_of)
            waiting = [n for n in range(1, self.num_prompts + 1) if n not in finished]
            running: dict[int, Line] = {}

            def prompts():
                for line in self._lines():
                    if line.number not in finished:
                        running[line.number] = line
                        yield line.fields["prompt"]

            def show(written):
                if progress is not None:
                    progress(len(finished) + written, self.num_prompts)

            samples = sampler.iterate(
                prompts(),
                batch_size=batch_size,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                seed=[self.seed + number for number in waiting],
                stop=self.stop,
            )
            show(0)
            for written, (index, sample) in enumerate(samples, start=1):
                line = running.pop(waiting[index])
                file.write(_record(line, digest_of(line), sample))
                file.flush()
                show(written)
        return len(waiting)

    @contextlib.contextmanager
    def _locked_output(self) -> Iterator[BinaryIO]:
        """The output, to append to; ValueError if another run has it open."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self.target.open("ab") as file:
            try:
                lock(file.fileno())
            except LockedError as error:
                raise ValueError(
                    f"{self.target}: expected an output that no other run writes, got "
                    "one that is being written; wait for that run, or give another"
                ) from error
            yield file

    def _lines(self) -> Iterator[Line]:
        """The lines of the input, checked."""
        self._input.seek(0)
        for number, data in enumerate(self._input, start=1):
            data = data.rstrip(b"\r\n")
            try:
                yield Line(number, data, _parse_input(data))
            except ValueError as error:
                raise ValueError(f"{self.source}, line {number}: {error}") from error

    def _opened(self) -> BinaryIO:
        """The input; one that can be read only once is copied to a file without a name,
        which is gone with the process."""
        file = self.source.open("rb")
        weakref.finalize(self, file.close)
        if self.source.is_file():
            return file
        copy = tempfile.TemporaryFile()  # noqa: SIM115  closed with the job
        weakref.finalize(self, copy.close)
        shutil.copyfileobj(file, copy)
        return copy

    def _digests(self, sampler: Sampler) -> Callable[[Line], str]:
        """The digest of a line's text."""
        tokenizer = sampler.tokenizer
        if tokenizer is None:
            raise ValueError("sampler: expected one with a tokenizer, got none")
        settings = [
            model_digest(sampler.model),
            hashlib.sha256(tokenizer.model_bytes).hexdigest(),
            dataclasses.asdict(self.sampling),
            self.max_new_tokens,
            self.seed,
            self.stop,
        ]
        common = hashlib.sha256(json.dumps(settings).encode())

        def digest_of(line: Line) -> str:
            digest = common.copy()
            digest.update(b"%d %s" % (line.number, line.data))
            return digest.hexdigest()[:_DIGEST_LENGTH]

        return digest_of

    def _finished(self, digest_of: Callable[[Line], str]) -> set[int]:
        """Numbers of the lines with a record; a record that was cut off is removed.

        Raises:
          ValueError: there is anything else in the output, or two records of a line.
        """
        finished, size = set(), 0
        if not self.target.is_file():
            return finished
        digests = {line.number: digest_of(line) for line in self._lines()}
        with self.target.open("rb") as file:
            for number, data in enumerate(file, start=1):
                start = data[: len(_RECORD_START)]
                if not data.endswith(b"\n") and _RECORD_START.startswith(start):
                    os.truncate(self.target, size)
                    break
                what = f"its line {number}"
                try:
                    record = json.loads(data)
                    line, digest = record["line"], record["digest"]
                    what = f"the record of line {line}"
                    if not data.endswith(b"\n") or digests[line] != digest:
                        raise ValueError("another text")
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ValueError(
                        f"{self.target}: {what} is not of this job, but of another "
                        "input, other settings or another model; give another output, "
                        "or remove this one."
                    ) from error
                if line in finished:
                    raise ValueError(
                        f"{self.target}: expected one record of each line, got a second "
                        f"one of line {line} in its line {number}; remove one of them"
                    )
                finished.add(line)
                size += len(data)
        return finished


def _parse_input(data: bytes) -> dict[str, Any]:
    """The fields of a line, of which every number can be written again."""

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(
                f"expected finite numbers, got {number}; write null instead"
            )
        return float(number)

    text = data.decode("utf-8").strip() or "null"
    try:
        fields: Any = json.loads(text, parse_float=finite, parse_constant=finite)
    except RecursionError as error:
        raise ValueError("expected less deeply nested JSON") from error
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    if type(prompt) is not str:
        got = text[:60] if data.strip() else "an empty line"
        raise ValueError(f'expected a JSON object with a "prompt" string, got {got}')
    prompt.encode("utf-8")
    for name in OUTPUT_FIELDS:
        if name in fields:
            raise ValueError(
                f'expected no field "{name}", which the output has; rename it'
            )
    return fields


def _record(line: Line, digest: str, sample: Sample) -> bytes:
    log_prob = float(np.sum(sample.log_probs, dtype=np.float64))
    record = {
        "line": line.number,
        "digest": digest,
        **line.fields,
        "text": sample.text,
        "num_tokens": len(sample.tokens),
        "log_prob": log_prob if math.isfinite(log_prob) else None,
        "ended": sample.ended,
    }
    return json.dumps(record, allow_nan=False).encode() + b"\n"
