"""A million tokens read at flat memory; their prefix saved, continued, questioned.

A model of about one million random parameters reads the source of Python's standard
library, line by line and again from the start, until it has read so many tokens. The
peak memory of the process is noted along the way. The prefix is saved and continued, in
this process and in a new one, and 100 questions are asked of it; what is read for that
is counted. A new process must continue alike, and some questions, asked one at a time,
must get the same answers.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import nnx

from recurrentgemma import cost
from recurrentgemma.benchmarks.paired import Disagreement
from recurrentgemma.benchmarks.report import Column, Report, note
from recurrentgemma.checkpoints import load, save
from recurrentgemma.config import GriffinConfig
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import PYTHON_STDLIB, read_documents

MARKS = 10
CONTINUATION = {"max_new_tokens": 64, "end_tokens": [], "seed": 1}
CHECKED_ANSWERS = 5
KIBIBYTE = 1024


def config(vocab_size: int) -> GriffinConfig:
    """About a million parameters, half of them the embedding of the nano tokenizer."""
    return GriffinConfig(
        vocab_size=vocab_size,
        width=128,
        mlp_width=320,
        num_layers=3,
        num_heads=2,
        head_dim=64,
        attention_window=256,
        lru_width=128,
        num_gate_blocks=2,
        embedding_scale=11.3125,
        logits_soft_cap=30.0,
    )


def lines() -> Iterator[str]:
    """The library's source, again and again."""
    documents = read_documents(PYTHON_STDLIB)
    for document in itertools.cycle(documents):
        yield from document.text.splitlines(keepends=True)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE


def take(source: Iterator[str], tokenizer: Tokenizer, num_tokens: int) -> Iterator[str]:
    """Lines of at least so many tokens."""
    while num_tokens > 0:
        line = next(source)
        num_tokens -= len(tokenizer.encode(line, add_bos=False))
        yield line


def read(
    sampler: Sampler, tokenizer: Tokenizer, num_tokens: int, report: Report
) -> Prefix:
    """Reads at least so many tokens; a row for each of ten equal distances."""
    source = lines()
    prefix = sampler.prefill(next(source))
    start = time.perf_counter()
    for mark in range(1, MARKS + 1):
        missing = num_tokens * mark // MARKS - int(prefix.num_tokens[0])
        prefix = sampler.prefill(take(source, tokenizer, missing), prefix=prefix)
        count = int(prefix.num_tokens[0])
        rate = count / (time.perf_counter() - start)
        row = {"tokens": count, "peak_bytes": peak_bytes(), "tokens_per_s": rate}
        report.add({"name": f"{count:,} tokens"} | row)
    return prefix


def ask(sampler: Sampler, prefix: Prefix, count: int) -> dict[str, Any]:
    """`count` questions of one prefix, in one call; none reads it again.

    Raises:
      Disagreement: a question asked alone got another answer.
    """
    questions = [
        f"\n# question {i}: what does function {i} do?\n" for i in range(count)
    ]
    request = {"prefix": prefix, "max_new_tokens": 16, "end_tokens": []}
    read_tokens = []
    start = time.perf_counter()
    answers = sampler(
        questions, progress=lambda _, total: read_tokens.append(total), **request
    )
    seconds = time.perf_counter() - start
    for i, question in enumerate(questions[:CHECKED_ANSWERS]):
        [alone] = sampler([question], seed=i, **request)
        if alone.tokens != answers[i].tokens:
            raise Disagreement(f"question {i} gets another answer when asked alone")
    return {
        "questions": count,
        "seconds": seconds,
        "longest_question_tokens": max(len(a.prompt_tokens) for a in answers),
        "tokens_read_for_each": max(read_tokens),
    }


def continuation(model: str, prefix: str) -> list[int]:
    """The tokens that a new process writes after a saved prefix."""
    sampler = Sampler(*load(model), compile_ahead=False)
    [sample] = sampler([[]], prefix=Prefix.load(prefix, sampler.model), **CONTINUATION)
    return sample.tokens


def saved_and_continued(sampler: Sampler, prefix: Prefix) -> int:
    """The size of the prefix's file, which a new process continues like this one.

    Raises:
      Disagreement: it writes something else.
    """
    [here] = sampler([[]], prefix=prefix, **CONTINUATION)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("model", "text.prefix")]
        save(paths[0], sampler.model, sampler.tokenizer)
        prefix.save(paths[1])
        code = f"from {__name__} import continuation; print(continuation(*{paths!r}))"
        there = subprocess.check_output([sys.executable, "-c", code], text=True)
        if json.loads(there) != here.tokens:
            raise Disagreement("a new process continues the saved prefix otherwise")
        return Path(paths[1]).stat().st_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--questions", type=int, default=100)


def run(options: argparse.Namespace) -> None:
    """Reads, continues and asks.

    Raises:
      Disagreement: what was read goes on otherwise elsewhere.
    """
    _, tokenizer = load("nano")
    assert tokenizer is not None
    model = Griffin(config(tokenizer.vocab_size), rngs=nnx.Rngs(0))
    sampler = Sampler(model, tokenizer, compile_ahead=False)
    columns = [
        Column("", "name", 20),
        Column("peak MB", "peak_bytes", scale=1e-6),
        Column("tokens/s", "tokens_per_s"),
    ]
    parameters = cost.num_parameters(model.config)
    report = Report(options.output, columns, parameters=parameters)
    prefix = read(sampler, tokenizer, options.tokens, report)
    size = saved_and_continued(sampler, prefix)
    questions = ask(sampler, prefix, options.questions)
    report.facts |= {"prefix_file_bytes": size, "questions": questions}
    report.write()
    note(f"A prefix of {size} bytes, continued alike in a new process; {questions}")
