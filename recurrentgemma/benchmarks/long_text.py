"""A million tokens read at flat memory; their prefix saved, continued, questioned.

    python -m recurrentgemma.benchmarks.long_text

A model of about one million random parameters reads the source of Python's standard
library, line by line and again from the start, until it has read so many tokens. The
peak memory of the process is noted along the way. The prefix is saved and continued, in
this process and in a new one, and 100 questions are asked of it; what is read for that
is counted, and some answers are checked against a sampler that asks one at a time.
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
from recurrentgemma.benchmarks.provenance import ROOT, provenance
from recurrentgemma.checkpoints import load, save
from recurrentgemma.config import GriffinConfig
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.results import Sample
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import PYTHON_STDLIB, read_documents

RESULTS = ROOT / "recurrentgemma" / "benchmarks" / "results" / "long_text.json"
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
    sampler: Sampler, tokenizer: Tokenizer, num_tokens: int, marks: int
) -> tuple[Prefix, list[dict]]:
    """Reads at least so many tokens; notes time and memory at equal distances."""
    source, notes = lines(), []
    prefix = sampler.prefill(next(source))
    start = time.perf_counter()
    for mark in range(1, marks + 1):
        missing = num_tokens * mark // marks - int(prefix.num_tokens[0])
        prefix = sampler.prefill(take(source, tokenizer, missing), prefix=prefix)
        seconds = time.perf_counter() - start
        count = int(prefix.num_tokens[0])
        notes.append(
            {
                "tokens": count,
                "peak_bytes": peak_bytes(),
                "tokens_per_s": count / seconds,
            }
        )
        print(
            f"{count:,} tokens, peak {notes[-1]['peak_bytes'] / 1e6:.1f} MB, "
            f"{notes[-1]['tokens_per_s']:,.0f} tokens/s",
            file=sys.stderr,
        )
    return prefix, notes


def ask(sampler: Sampler, prefix: Prefix, count: int) -> dict[str, Any]:
    """`count` questions of one prefix, in one call; none reads it again."""
    questions = [
        f"\n# question {i}: what does function {i} do?\n" for i in range(count)
    ]
    request = {"max_new_tokens": 16, "end_tokens": []}
    read_tokens = []
    start = time.perf_counter()
    answers = sampler(
        questions,
        prefix=prefix,
        progress=lambda _, total: read_tokens.append(total),
        **request,
    )
    seconds = time.perf_counter() - start
    alone: list[Sample] = []
    for i in range(CHECKED_ANSWERS):
        alone += sampler([questions[i]], prefix=prefix, seed=i, **request)
    return {
        "questions": count,
        "seconds": seconds,
        "longest_question_tokens": max(len(a.prompt_tokens) for a in answers),
        "tokens_read_for_each": max(read_tokens),
        "checked_answers_equal": all(
            one.tokens == together.tokens
            for one, together in zip(alone, answers, strict=False)
        ),
    }


def continuation(model: str, prefix: str) -> list[int]:
    """The tokens that a new process writes after a saved prefix."""
    sampler = Sampler(*load(model), compile_ahead=False)
    [sample] = sampler([[]], prefix=Prefix.load(prefix, sampler.model), **CONTINUATION)
    return sample.tokens


def measure(num_tokens: int, questions: int, marks: int = 10) -> dict[str, Any]:
    """The JSON document."""
    _, tokenizer = load("nano")
    assert tokenizer is not None
    model = Griffin(config(tokenizer.vocab_size), rngs=nnx.Rngs(0))
    sampler = Sampler(model, tokenizer, compile_ahead=False)
    prefix, notes = read(sampler, tokenizer, num_tokens, marks)
    [here] = sampler([[]], prefix=prefix, **CONTINUATION)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "model", model, tokenizer)
        file = Path(folder) / "text.prefix"
        prefix.save(file)
        command = [sys.executable, "-m", __spec__.name, "--continue-from", folder]
        there = json.loads(subprocess.check_output(command, text=True))
        file_bytes = file.stat().st_size
    return {
        **provenance(),
        "parameters": cost.num_parameters(model.config),
        "reading": notes,
        "prefix_file_bytes": file_bytes,
        "continued_alike_in_a_new_process": here.tokens == there,
        "questions": ask(sampler, prefix, questions),
    }


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--continue-from", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if folder := arguments.continue_from:
        print(json.dumps(continuation(str(folder / "model"), folder / "text.prefix")))
        return
    document = measure(arguments.tokens, arguments.questions)
    print(json.dumps(document, indent=1))
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
