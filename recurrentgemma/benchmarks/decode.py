"""Tokens/s of writing, against the number of tokens that were read before.

A cache that has read `length` tokens writes blocks of 64 greedy tokens, as the sampler
does, always from the same length. Up to `--read-up-to` tokens are really read, one row
of them, which is repeated; longer ones are filled with random values, and marked. Caches
that grow have room for these tokens and no more. The ceiling is the time of reading all
parameters and the whole cache once a step, at the rate at which this device multiplies
as many rows with weights from memory.
"""

import time
from typing import Any

import jax
from absl import flags

from recurrentgemma import cache as cache_lib
from recurrentgemma import cost
from recurrentgemma.benchmarks.models import Programs, Subject, random_tokens
from recurrentgemma.benchmarks.report import Column, Row
from recurrentgemma.benchmarks.sweep import RATE_COLUMNS, Point, Sweep, counts, speed
from recurrentgemma.cache import Cache
from recurrentgemma.generation.programs import BLOCK_STEPS


def measure(subject: Subject, point: Point, values: dict[str, Any]) -> Row:
    """Writes blocks of tokens, once to warm up and then for each sample."""
    config, batch, length = subject.config, point.batch, point.length
    programs = subject.programs(batch, length + BLOCK_STEPS)
    compile_s = programs.compile_for()
    is_read = length <= longest_read(values)
    if is_read:
        cache = read_cache(subject, programs, length)
    else:
        cache = programs.synthetic_cache(length)
    state = programs.write(programs.start(cache), BLOCK_STEPS)
    samples = []
    for _ in range(point.repeats):
        state = jax.block_until_ready(programs.rewind(state, length))
        start = time.perf_counter()
        state = jax.block_until_ready(programs.write(state, BLOCK_STEPS))
        samples.append(time.perf_counter() - start)
    sizes = {"dtype": subject.runtime.dtype, "capacity": length}
    moved = cost.decode_bytes(config, batch, **sizes)
    ceiling = batch * point.rates[f"read_{batch}_rows_bytes_per_s"] / moved
    found = speed(samples, batch * BLOCK_STEPS, ceiling)
    return found | {
        "ms_per_token": 1e3 * batch / found["tokens_per_s"],
        "cache_bytes": cost.cache_bytes(config, batch, **sizes),
        "compile_s": compile_s,
        "synthetic": not is_read,
        "remark": "" if is_read else "synthetic cache",
    }


def read_cache(subject: Subject, programs: Programs, length: int) -> Cache:
    """A cache whose rows have all read the same random tokens."""
    reader = subject.programs(1, length + BLOCK_STEPS)
    reader.compile_for(length)
    cache = reader.read(reader.new_cache(), random_tokens(subject.config, 1, length))
    return cache if programs.batch == 1 else cache_lib.repeat(cache, programs.batch)


def define_more(values: flags.FlagValues) -> None:
    """How long a text is read before its cache is filled instead."""
    what = "longest text that is read; longer caches are filled, and marked"
    flags.DEFINE_string("read-up-to", "8k", what, flag_values=values)


def longest_read(values: dict[str, Any]) -> int:
    """The value of --read-up-to.

    Raises:
      ValueError: it is no number of tokens.
    """
    [length] = counts("read-up-to", [values["read-up-to"]])
    return length


COLUMNS = (
    *RATE_COLUMNS,
    Column("ms a token", "ms_per_token", 10),
    Column("cache MB", "cache_bytes", 10, 1e-6),
)
SWEEP = Sweep(
    "decode",
    measure,
    lengths="1k,2k,4k,8k,16k,32k,64k,128k,256k",
    batches="1,8",
    columns=COLUMNS,
    define_more=define_more,
    check_more=longest_read,
)
define_flags, run = SWEEP.define_flags, SWEEP.run
