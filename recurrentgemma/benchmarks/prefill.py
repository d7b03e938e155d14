"""Tokens/s of reading a prompt, and the time to the first token.

Each row reads a prompt of `length` random tokens in chunks, as the sampler does, and
writes one token; then it reads a question of 16 more tokens from the cache that was
kept, and writes one more. Columns: tokens/s of reading the prompt, the time to the first
token, and the time from the question to its first token. The ceiling is the device's
matrix product at the FLOPs of these tokens, without logits, which a prompt has none of.
"""

import statistics
import time
from typing import Any

import jax

from recurrentgemma import cost
from recurrentgemma.benchmarks.models import Subject, random_tokens
from recurrentgemma.benchmarks.report import Column, Row
from recurrentgemma.benchmarks.sweep import RATE_COLUMNS, Point, Sweep, speed

QUESTION = 16
"""Tokens of the question after a prompt."""


def measure(subject: Subject, point: Point, _: dict[str, Any]) -> Row:
    """Reads and writes, once to warm up and then for each sample."""
    config, length = subject.config, point.length
    programs = subject.programs(point.batch, length + QUESTION + 2)
    compile_s = programs.compile_for(length, QUESTION)
    prompt = random_tokens(config, point.batch, length)
    question = random_tokens(config, point.batch, QUESTION)

    def sample() -> tuple[float, float, float]:
        """Seconds of reading, to the first token, and from a question to its first."""
        cache = jax.block_until_ready(programs.new_cache())
        start = time.perf_counter()
        cache = jax.block_until_ready(programs.read(cache, prompt))
        read = time.perf_counter()
        state = jax.block_until_ready(programs.write(programs.start(cache), 1))
        first = time.perf_counter()
        cache = programs.read(state.caches[0], question)
        jax.block_until_ready(programs.write(programs.start(cache), 1))
        answered = time.perf_counter()
        return read - start, first - start, answered - first

    sample()
    reads, firsts, answers = zip(*(sample() for _ in range(point.repeats)), strict=True)
    flops = cost.forward_flops_per_token(config, length)
    flops -= 2 * config.vocab_size * config.width
    ceiling = point.rates["product_flops_per_s"] / flops
    return speed(reads, point.batch * length, ceiling) | {
        "first_token_s": statistics.median(firsts),
        "first_token_samples_s": firsts,
        "kept_prefix_first_token_s": statistics.median(answers),
        "kept_prefix_samples_s": answers,
        "compile_s": compile_s,
    }


SWEEP = Sweep(
    "prefill",
    measure,
    lengths="512,1k,2k,4k,8k,16k,32k",
    columns=(
        *RATE_COLUMNS,
        Column("first token ms", "first_token_s", 14, 1e3),
        Column("after a prefix ms", "kept_prefix_first_token_s", 17, 1e3),
    ),
)
define_flags, run = SWEEP.define_flags, SWEEP.run
