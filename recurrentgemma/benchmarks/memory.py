"""Bytes of a model and its cache against length, and the longest text that fits.

Exact are the bytes of the parameters and of the cache after `length` tokens, and what
the compiled programs need: the largest of those that read a chunk and write. The peak is
measured while a filled cache writes a block of tokens: on a CPU that of the process.
`longest` is the number of tokens of one row that the memory has room for, beside what the
programs need at this length; "any" of a model whose cache does not grow.
"""

from typing import Any

import jax

from recurrentgemma import cache as cache_lib
from recurrentgemma import cost
from recurrentgemma.benchmarks.models import Subject
from recurrentgemma.benchmarks.picture import Panel, lines_of
from recurrentgemma.benchmarks.report import Column, Row
from recurrentgemma.benchmarks.sweep import Point, Sweep
from recurrentgemma.generation.programs import BLOCK_STEPS, CHUNK_SIZES


def measure(subject: Subject, point: Point, _: dict[str, Any]) -> Row:
    """Compiles the programs, and writes one block of tokens."""
    config, batch, length = subject.config, point.batch, point.length
    programs = subject.programs(batch, length + BLOCK_STEPS)
    programs.compile_for(CHUNK_SIZES[-1])
    state = programs.start(programs.synthetic_cache(length))
    jax.block_until_ready(programs.write(state, BLOCK_STEPS))

    def cache_bytes(tokens: int) -> int:
        sizes = {"dtype": subject.runtime.dtype, "capacity": tokens}
        return cost.cache_bytes(config, batch, **sizes)

    longest: int | str = "any"
    if cache_lib.grows(config):
        per_token = cache_bytes(length + 1) - cache_bytes(length)
        longest = length + (subject.memory - programs.needed_bytes) // per_token
    return {
        "parameter_bytes": cost.parameter_bytes(config, subject.runtime.dtype),
        "cache_bytes": cache_bytes(length),
        "needed_bytes": programs.needed_bytes,
        "longest": longest,
        "synthetic": True,
    }


def panels(rows: list[Row]) -> list[Panel]:
    """The cache and what the programs need, by length."""
    read_rows = [row | {"synthetic": False} for row in rows]  # sizes are exact
    return [
        Panel("tokens", label, lines_of(read_rows, key))
        for key, label in (
            ("cache_bytes", "cache, bytes"),
            ("needed_bytes", "programs with parameters and cache, bytes"),
        )
    ]


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
