"""Bytes of a model and its cache against length, and the longest text that fits.

Exact are the bytes of the parameters and of the cache after `length` tokens, and what
the compiled programs need: the largest of those that read a chunk and write. The peak is
measured while a filled cache writes a block of tokens: on a CPU that of the process.
`longest` is the number of tokens in a row at which the programs need all of the memory,
found by compiling them for some lengths and straight lines between; "any" of a model
whose cache does not grow.
"""

import functools
import sys
from typing import Any

import jax

from recurrentgemma import cache as cache_lib
from recurrentgemma import cost
from recurrentgemma.benchmarks.models import Programs, Subject, abstract_model
from recurrentgemma.benchmarks.picture import Panel, lines_of
from recurrentgemma.benchmarks.report import Column, Row
from recurrentgemma.benchmarks.sweep import Point, Sweep
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.generation.programs import BLOCK_STEPS, CHUNK_SIZES

NO_LIMIT = sys.maxsize
"""Memory of programs that are compiled alone."""
PRECISION = 1 / 32
"""Share of the memory by which the longest text may miss it."""
REFINEMENTS = 2
"""How often the longest text is estimated from the one before."""


def measure(subject: Subject, point: Point, _: dict[str, Any]) -> Row:
    """Compiles the programs, and writes one block of tokens."""
    config, batch, length = subject.config, point.batch, point.length
    programs = subject.programs(batch, length + BLOCK_STEPS)
    programs.compile_for(CHUNK_SIZES[-1])
    state = programs.start(programs.synthetic_cache(length))
    jax.block_until_ready(programs.write(state, BLOCK_STEPS))

    sizes = {"dtype": subject.runtime.dtype, "capacity": length}
    return {
        "parameter_bytes": cost.parameter_bytes(config, subject.runtime.dtype),
        "cache_bytes": cost.cache_bytes(config, batch, **sizes),
        "needed_bytes": programs.needed_bytes,
        "longest": longest_text(config, subject.runtime, batch, subject.memory),
        "synthetic": True,
    }


@functools.cache
def longest_text(
    config: GriffinConfig, runtime: Runtime, batch: int, memory: int
) -> int | str:
    """Most tokens in each of some rows for which the programs fit the memory, or "any".

    Nothing is allocated. 0 if not even one token fits.
    """
    if not cache_lib.grows(config):
        return "any"
    model = abstract_model(config, runtime)

    def needed(tokens: int) -> int:
        programs = Programs(model, batch, tokens + BLOCK_STEPS, NO_LIMIT)
        programs.compile_for(CHUNK_SIZES[-1])
        return programs.needed_bytes

    sizes = {"dtype": runtime.dtype, "capacity": 1}
    cache = cost.cache_bytes(config, batch, **sizes)
    # The caches alone would fill the memory at the end of the line.
    low, high = CHUNK_SIZES[-1], max(memory // cache, 2 * CHUNK_SIZES[-1])
    needed_low, needed_high = needed(low), needed(high)
    for _ in range(REFINEMENTS):
        slope = (needed_high - needed_low) / (high - low)
        low = max(low + int((memory - needed_low) / slope), 1)
        needed_low = needed(low)
    if needed_low <= memory * (1 + PRECISION):
        return low
    # Short texts have other programs, whose sizes are on no line.
    fits, too_long = 0, low
    while too_long - fits > max(1, int(too_long * PRECISION)):
        middle = (fits + too_long) // 2
        if needed(middle) <= memory:
            fits = middle
        else:
            too_long = middle
    return fits


def panels(rows: list[Row]) -> list[Panel]:
    """The cache and what the programs need, by length."""
    found = []
    for key, label in (
        ("cache_bytes", "cache, MB"),
        ("needed_bytes", "programs with parameters and cache, MB"),
    ):
        sizes = [  # exact, also of a cache that was filled
            row | {"synthetic": False, "MB": row[key] / 1e6}
            for row in rows
            if not row.get("out_of_memory")
        ]
        found.append(Panel("tokens", label, lines_of(sizes, "MB")))
    return found


SWEEP = Sweep(
    "memory",
    measure,
    lengths="1k,4k,16k,64k,256k,1M",
    columns=(
        Column("parameters MB", "parameter_bytes", 13, 1e-6),
        Column("cache MB", "cache_bytes", 10, 1e-6),
        Column("programs MB", "needed_bytes", 11, 1e-6),
        Column("peak MB", "peak_bytes", 9, 1e-6),
        Column("longest", "longest", 12),
    ),
    panels=panels,
)
define_flags, run = SWEEP.define_flags, SWEEP.run
