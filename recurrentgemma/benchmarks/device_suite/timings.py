"""How fast ops and models are on the device.

An op's row has the bandwidth of its least bytes: every argument read once and every
result written once, beside what `x + 1` over large arrays moves. A model's row has the
share of what the device's own matrix products of these shapes, or the reading of the
weights, allow.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.benchmarks import decode, device, models, prefill, train
from recurrentgemma.benchmarks.device_suite.checks import names_here
from recurrentgemma.benchmarks.device_suite.pieces import COPY, DEFAULT, DONE, Piece
from recurrentgemma.benchmarks.device_suite.sizes import Size
from recurrentgemma.benchmarks.models import Subject, check_memory
from recurrentgemma.benchmarks.report import Row
from recurrentgemma.benchmarks.scan_programs import OPS, program, random_arguments
from recurrentgemma.benchmarks.sweep import Point
from recurrentgemma.config import Runtime
from recurrentgemma.kernels import dispatch, local_attention
from recurrentgemma.kernels.linear_scan import LINEAR_SCAN
from recurrentgemma.kernels.local_attention import LOCAL_ATTENTION, ring
from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings
from recurrentgemma.kernels.recurrent_step import RECURRENT_STEP
from recurrentgemma.kernels.rg_lru import FROM_GATES
from recurrentgemma.kernels.rg_lru.gates import Inputs

USABLE_MEMORY = 0.9
MODEL_LIMIT_S = 300.0
SHORTEST_PREFIX = "1"
"""Longest text that is read before decoding; longer caches are filled at random."""


class Timed(NamedTuple):
    """A program of an op.

    Attributes:
      name: Name of the program.
      check: Op of the checks, as `Case.op` names it.
      op: The op.
      function: (implementation) -> a function of the arguments.
      make: () -> the arguments, traceable.
      dispatched: (the arguments) -> positional arguments and options of the op.
    """

    name: str
    check: str
    op: dispatch.Op
    function: Callable[[str | None], Callable[..., Any]]
    make: Callable[[], tuple[Any, ...]]
    dispatched: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]


def pieces(size: Size, platform: str) -> Iterator[Piece]:
    """The copy bandwidth, then every op by default and by name, in the device's dtype."""
    dtype = Runtime().dtype.name
    yield Piece("time", COPY, DEFAULT, "float32", _copy)
    for timed in [*_recurrences(size, dtype), *_attentions(size, dtype)]:
        names = [
            name
            for name in names_here(timed.op.table, platform, by_default=False)
            if name != "reference" or timed.op.table[name].default_on
        ]
        # What has one implementation has nothing to compare.
        for name in [DEFAULT, *(names if len(names) > 1 else ())]:
            work = partial(time_op, timed, name, size.most_calls)
            yield Piece("time", timed.name, name, dtype, work)


def model_pieces(size: Size) -> Iterator[Piece]:
    """Prefill, decode and train step of models with random weights."""
    dtype = Runtime().dtype.name

    def piece(what, preset, measure, batch, length, **values):
        work = partial(_measure, size, preset, measure, batch, length, values)
        name = f"{preset}: {what}"
        return Piece("model", name, DEFAULT, dtype, work, MODEL_LIMIT_S)

    yield from (
        piece(f"prefill {length}", size.model, prefill.measure, 1, length)
        for length in size.prefill_lengths
    )
    options = {"read-up-to": SHORTEST_PREFIX}
    length = size.prefill_lengths[0]
    yield from (
        piece(f"decode {batch}", size.model, decode.measure, batch, length, **options)
        for batch in size.decode_batches
    )
    for preset in dict.fromkeys((size.model, size.small_model)):
        yield piece("train step", preset, train.measure, 1, size.train_length)


def _copy() -> Row:
    rates = device.copy_bytes_per_s(device.memory_bytes())
    return {"bytes_per_s": max(rates.values()), "bytes_per_s_by_size": rates}


def _recurrences(size: Size, dtype: str) -> Iterator[Timed]:
    for workload_name, workload in size.workloads.items():
        for name, (check, op, dispatched) in RECURRENCES.items():
            if OPS[name].fits(workload):
                yield Timed(
                    f"{name}: {workload_name} {'x'.join(map(str, workload))}",
                    check,
                    op,
                    partial(_recurrence, name, workload, dtype),
                    partial(_recurrence_arguments, name, workload, dtype),
                    dispatched,
                )


def _recurrence(name, workload, dtype, implementation):
    return program(workload, dtype, op=name, implementation=implementation)[0]


def _recurrence_arguments(name, workload, dtype):
    return tuple(random_arguments(name, workload, dtype, seed=1).values())


def _as_gates(*arrays):
    """The arguments of the op, of which `rg_lru` and its gradient have the first six."""
    return (Inputs(*arrays[:6]),), {}


RECURRENCES = {
    "linear_scan": (
        "linear_scan",
        LINEAR_SCAN,
        lambda x, a, h0: ((x, a, h0), {"reverse": False}),
    ),
    "linear_scan gradient": (
        "linear_scan",
        LINEAR_SCAN,
        lambda a, h0, y, *_: ((y, a, h0), {"reverse": False}),
    ),
    "rg_lru_with_gates": ("rg_lru", FROM_GATES, _as_gates),
    "rg_lru_with_gates gradient": ("rg_lru", FROM_GATES, _as_gates),
    "recurrent_step": ("recurrent_step", RECURRENT_STEP, lambda *step: (step, {})),
}
"""Names of `scan_programs.OPS` that are timed: `Timed.check`, `Timed.op` and
`Timed.dispatched` of each."""


def _attentions(size: Size, dtype: str) -> Iterator[Timed]:
    length, heads, head_dim, window = size.attention
    settings = Settings(window, head_dim**-0.5, None)

    def attend(implementation, *qkv):
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        options = {**settings._asdict(), "implementation": implementation}
        return local_attention(*qkv, positions=positions, cache=None, **options)[0]

    def forward(implementation):
        return partial(attend, implementation)

    def gradient(implementation):
        def run(*qkv):
            out, pull_back = jax.vjp(partial(attend, implementation), *qkv)
            return pull_back(out)

        return run

    def make():
        shapes = [(1, length, n, head_dim) for n in (heads, 1, 1)]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        pairs = zip(keys, shapes, strict=True)
        return tuple(jax.random.normal(key, shape, dtype) for key, shape in pairs)

    def dispatched(q, k, v):
        positions = jnp.zeros((1, length), jnp.int32)
        return (Chunk(q, k, v, positions, ring.empty(k, v, 0)),), {"settings": settings}

    shape = f"1x{length}x{heads}x{head_dim} window {window}"
    for name, function in (("", forward), (" with gradient", gradient)):
        title = f"local_attention{name}: {shape}"
        yield Timed(
            title, "local_attention", LOCAL_ATTENTION, function, make, dispatched
        )


def time_op(timed: Timed, name: str, most_calls: int) -> Row:
    """Times a program by an implementation.

    Args:
      timed: the program.
      name: of the implementation, or "default".
      most_calls: in a sample.

    Raises:
      OutOfMemory: its arguments, results and temporaries do not fit.
      NotImplementedError: the implementation cannot run it.
    """
    function = timed.function(None if name == DEFAULT else name)
    shapes = jax.eval_shape(timed.make)
    results = _bytes(jax.eval_shape(function, *shapes))
    moved = _bytes(shapes) + results
    memory = int(USABLE_MEMORY * device.memory_bytes())
    # Another set of results exists while the next call runs.
    check_memory(moved + results, memory)
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*shapes).compile()
    compile_s = time.perf_counter() - start
    needed = models.needed_bytes(compiled) + results
    check_memory(needed, memory)
    in_flight = 1 + (memory - needed) // results
    samples = device.seconds_per_call(
        compiled, *jax.jit(timed.make)(), most_calls=min(most_calls, in_flight)
    )
    seconds = statistics.median(samples)
    return {
        "check": timed.check,
        "chosen": _chosen(timed) if name == DEFAULT else name,
        "least_bytes": moved,
        "measured_ms": 1e3 * seconds,
        "samples_ms": [1e3 * sample for sample in samples],
        "bytes_per_s": moved / seconds,
        "compile_s": compile_s,
    }


def _chosen(timed: Timed) -> str:
    """The name of the implementation that runs by default."""
    names = []

    def look(*arrays):
        arguments, options = timed.dispatched(*arrays)
        found = dispatch.chosen(timed.op, device.platform(), *arguments, **options)
        names.append(found)

    jax.eval_shape(look, *jax.eval_shape(timed.make))
    return names[0]


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _measure(size, preset, measure, batch, length, values) -> Row:
    rates = _rates(preset, size.decode_batches)
    dtype = Runtime().dtype.name
    point = Point(preset, dtype, batch, length, size.repeats, rates)
    row = measure(_subject(preset), point, values)
    # A model's row has a remark about the cache; here a remark is a failure's.
    return {"status": DONE} | {k: v for k, v in row.items() if k != "remark"}


@functools.lru_cache(maxsize=1)
def _subject(preset: str) -> Subject:
    """The model that is measured, which stays for the next piece."""
    return Subject(models.find(preset), None, device.memory_bytes())


@functools.lru_cache
def _rates(preset: str, batches: tuple[int, ...]) -> dict[str, float]:
    return device.rates(models.find(preset), batches, Runtime().dtype.name)
