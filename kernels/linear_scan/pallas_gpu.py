"""The linear scan as Pallas kernels for GPU, through Triton.

A program takes CHANNELS neighbouring channels of one row, a thread for each, through
time: UNROLL steps are loaded at once, so that their latencies overlap, then computed and
stored. Where rows and channels are too few to fill the chip, time is cut into chunks
that run side by side, in two passes over the inputs:

    1. each chunk's product of decays and its last state when started from zero;
    2. each chunk's first state, from the summaries of the chunks before it; its states.

Arrays keep the layout [B, T, D] that they have; the carry is float32. The gradient is
the same two passes in the other direction, with c_T the gradient of h_last:

    g_t = dy_t + c_{t+1}     c_t = a_t g_t
    grad_x_t = g_t           grad_a_t = g_t y_{t-1}           grad_h0 = c_0

Another op with this recurrence brings a function that makes x_t and a_t of what is
loaded at a step (`Read`); `rg_lru/pallas_gpu.py` does. All that is particular to the
Triton back end is `call`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

CHANNELS = 32
"""Of a program: the threads of a warp."""
UNROLL = 32
"""Steps whose inputs are in flight together."""
PROGRAMS = 512
"""Enough to fill a chip: four warps, and 32 KB in flight, for each of 128 processors."""
SHORTEST_CHUNK = 128
"""Steps below which a chunk is not worth its summary."""
INTERPRETED_UNROLL, INTERPRETED_PROGRAMS = 2, 8
"""Interpreted, long code takes long to compile and programs run one after another."""

Load = Callable[[Any], jax.Array]
"""Of a row of the chunk: a step's values."""
Read = Callable[..., tuple[list[Load], Callable[..., tuple[jax.Array, jax.Array]]]]
"""Of refs: what to load at a step, and a function from that to x_t and a_t, float32."""


class Schedule(NamedTuple):
    """How programs go through time.

    Attributes:
      length: T.
      chunk: steps of a chunk; the last one may have fewer.
      chunks: how many there are.
      unroll: steps handled together.
      reverse: whether from the last step to the first.
      interpret: whether the kernels are interpreted.
    """

    length: int
    chunk: int
    chunks: int
    unroll: int
    reverse: bool
    interpret: bool


class Before(NamedTuple):
    """An array [B, T, D] of which a program sees the step before its chunk."""

    array: jax.Array


class PerStep(NamedTuple):
    """An array [B, T], the same in all channels."""

    array: jax.Array


class PerChunk(NamedTuple):
    """An array [B, chunks, D]."""

    array: Any


Array = jax.Array | Before | PerStep | PerChunk
"""What a kernel reads: `call` says what it sees of it."""


def _read(x, a):
    return [load(x), load(a)], lambda x_t, a_t: (x_t, a_t)


def _summary_kernel(*refs, read, schedule, adjoint):
    *inputs, product, end = refs
    loads, scan_inputs = read(*inputs)

    def step(carry, inputs):
        decay, h = carry
        x_t, a_t = scan_inputs(*inputs)
        h = a_t * (x_t + h) if adjoint else a_t * h + x_t
        return (a_t * decay, h), ()

    zeros = jnp.zeros([CHANNELS], jnp.float32)
    product[...], end[...] = for_each_step(
        step, (zeros + 1, zeros), loads, [], schedule
    )


def _scan_kernel(*refs, read, schedule):
    *inputs, h0, products, ends, y, h_last = refs
    loads, scan_inputs = read(*inputs)

    def step(h, inputs):
        x_t, a_t = scan_inputs(*inputs)
        h = a_t * h + x_t
        return h, (h,)

    h = first_state(h0, products, ends, schedule)
    h = for_each_step(step, h, loads, [y], schedule)
    store_last(h_last, h, schedule)


def _gradient_kernel(
    dy, a, y, y_before, h0, d_last, products, ends, dx, da, dh, *, schedule
):
    def step(c, inputs):
        dy_t, a_t, before = inputs
        g = dy_t + c
        return a_t * g, (g, g * before)

    c = first_state(d_last, products, ends, schedule)
    loads = [load(dy), load(a), load_before(y, y_before, h0)]
    c = for_each_step(step, c, loads, [dx, da], schedule)
    store_last(dh, c, schedule)


@partial(jax.jit, static_argnames=("reverse", "interpret"))
def scan(
    x: jax.Array,
    a: jax.Array,
    h0: jax.Array,
    reverse: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""
    schedule = choose_schedule(x.shape, UNROLL, reverse, interpret)
    return scan_of("linear_scan", _read, (x, a), h0, schedule)


@partial(jax.jit, static_argnames="interpret")
def gradients(
    a: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, a and h0, from the result y and the gradients of y and h_last."""
    schedule = choose_schedule(a.shape, UNROLL, True, interpret)
    arrays = (y_gradient, a)
    dx, da, dh = call(
        partial(_gradient_kernel, schedule=schedule),
        "linear_scan_gradient",
        (
            *arrays,
            y,
            Before(y),
            h0,
            last_gradient,
            *summaries("linear_scan_adjoint", _read, arrays, schedule, adjoint=True),
        ),
        (y_gradient, a, h0),
        schedule,
    )
    return dx, da, dh


def scan_of(
    name: str,
    read: Read,
    arrays: Sequence[Array],
    h0: jax.Array,
    schedule: Schedule,
) -> tuple[jax.Array, jax.Array]:
    """The states y, like the first array, and the last state of the scan that is read.

    Args:
      name: of the kernel.
      read: takes refs of the arrays.
      arrays: of which the first is [B, T, D]; `call` lists the others' kinds.
      h0: float32 [B, D].
      schedule: how time is taken.
    """
    y, h_last = call(
        partial(_scan_kernel, read=read, schedule=schedule),
        name,
        (*arrays, h0, *summaries(f"{name}_summary", read, arrays, schedule)),
        (arrays[0], h0),
        schedule,
    )
    return y, h_last


def summaries(
    name: str,
    read: Read,
    arrays: Sequence[Array],
    schedule: Schedule,
    adjoint: bool = False,
) -> list[PerChunk]:
    """Of each chunk, the product of its decays and its last state from zero.

    Args:
      name, read, arrays, schedule: as of `scan_of`.
      adjoint: whether the state is c, of the equations above, rather than h.

    Returns:
      Two float32 arrays [B, chunks, D].
    """
    batch, _, width = _plain(arrays[0]).shape
    state = jax.ShapeDtypeStruct((batch, schedule.chunks, width), jnp.float32)
    if schedule.chunks == 1:
        return [PerChunk(jnp.zeros(state.shape, state.dtype))] * 2
    kernel = partial(_summary_kernel, read=read, schedule=schedule, adjoint=adjoint)
    results = call(kernel, name, arrays, [PerChunk(state)] * 2, schedule)
    return [PerChunk(result) for result in results]


def choose_schedule(
    shape: tuple[int, ...], unroll: int, reverse: bool, interpret: bool
) -> Schedule:
    """How to go through arrays of this shape, [B, T, D]."""
    batch, length, width = shape
    programs = PROGRAMS
    if interpret:
        unroll, programs = INTERPRETED_UNROLL, INTERPRETED_PROGRAMS
    chunks = pl.cdiv(programs, batch * pl.cdiv(width, CHANNELS))
    chunks = min(chunks, max(length // SHORTEST_CHUNK, 1))
    chunk = min(pl.cdiv(length, chunks * unroll) * unroll, length)
    chunks = pl.cdiv(length, chunk)
    return Schedule(length, chunk, chunks, unroll, reverse, interpret)


def load(ref) -> Load:
    """Of a ref [steps, CHANNELS], in float32."""
    return lambda row: ref[row, :].astype(jnp.float32)


def load_before(y, y_before, h0) -> Load:
    """Of the state before a step, from refs of the states, of `Before` them and of h0."""
    starts = pl.program_id(2) == 0
    edge = jnp.where(starts, h0[...], y_before[...].astype(jnp.float32))

    def load_row(row):
        earlier = y[jnp.maximum(row - 1, 0), :].astype(jnp.float32)
        return jnp.where(row == 0, edge, earlier)

    return load_row


def for_each_step(
    step: Callable[[Any, tuple], tuple[Any, tuple]],
    carry: Any,
    loads: Sequence[Load],
    outputs: Sequence,
    schedule: Schedule,
) -> Any:
    """Runs `step(carry, inputs_t) -> carry, outputs_t` over the chunk of this program.

    Some steps at a time, and what is left at the end of the chunk one by one.
    """
    unroll = schedule.unroll
    left = schedule.length - pl.program_id(2) * schedule.chunk
    count = jnp.minimum(schedule.chunk, left)

    def run(start, steps, carry):
        """The steps from the `start`-th on, in the order of time's direction."""
        rows = [start + i for i in range(steps)]
        rows = [count - 1 - row if schedule.reverse else row for row in rows]
        loaded = [tuple(load(row) for load in loads) for row in rows]
        for row, values in zip(rows, loaded, strict=True):
            carry, results = step(carry, values)
            for ref, result in zip(outputs, results, strict=True):
                ref[row, :] = result.astype(ref.dtype)
        return carry

    groups = count // unroll
    carry = jax.lax.fori_loop(
        0, groups, lambda i, carry: run(i * unroll, unroll, carry), carry
    )
    return jax.lax.fori_loop(
        groups * unroll, count, lambda i, carry: run(i, 1, carry), carry
    )


def first_state(h0, products, ends, schedule: Schedule) -> jax.Array:
    """The state before this program's chunk, from refs."""
    chunk, last = pl.program_id(2), schedule.chunks - 1

    def carry_over(i, h):
        index = last - i if schedule.reverse else i
        return products[index, :] * h + ends[index, :]

    earlier = last - chunk if schedule.reverse else chunk
    return jax.lax.fori_loop(0, earlier, carry_over, h0[...])


def store_last(ref, state: jax.Array, schedule: Schedule) -> None:
    """Stores the state after all steps, if this program has taken the last one."""

    @pl.when(pl.program_id(2) == (0 if schedule.reverse else schedule.chunks - 1))
    def _():
        ref[...] = state


def call(
    kernel: Callable[..., None],
    name: str,
    arrays: Sequence[Array],
    results: Sequence[Array],
    schedule: Schedule,
) -> list[jax.Array]:
    """Runs a kernel for every block of channels, row and chunk.

    It gets refs [chunk, CHANNELS] of sequences [B, T, D], [CHANNELS] of states [B, D]
    and of what is `Before`, and [chunk] of what is `PerStep`. Of what is `PerChunk` it
    reads all, [chunks, CHANNELS], and writes its own, [CHANNELS].

    Args:
      kernel: takes the refs.
      name: of the kernel.
      arrays: what it reads; the first is a sequence.
      results: what its results look like.
      schedule: how time is taken.
    """
    batch, _, width = _plain(arrays[0]).shape
    chunk, chunks = schedule.chunk, schedule.chunks
    more = -width % CHANNELS

    def of_sequence(rows, index):
        return pl.BlockSpec((None, rows, CHANNELS), lambda d, b, c: (b, index(c), d))

    def spec(array, output):
        match array:
            case Before():
                return of_sequence(None, lambda c: jnp.maximum(c * chunk - 1, 0))
            case PerStep():
                return pl.BlockSpec((None, chunk), lambda d, b, c: (b, c))
            case PerChunk():
                if output:
                    return of_sequence(None, lambda c: c)
                return of_sequence(chunks, lambda c: 0)
        if len(array.shape) == 2:
            return pl.BlockSpec((None, CHANNELS), lambda d, b, c: (b, d))
        return of_sequence(chunk, lambda c: c)

    def pad(array):
        if isinstance(array, PerStep) or not more:
            return _plain(array)
        array = _plain(array)
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)])

    padded = pl.pallas_call(
        kernel,
        name=name,
        grid=((width + more) // CHANNELS, batch, chunks),
        in_specs=[spec(array, False) for array in arrays],
        out_specs=[spec(result, True) for result in results],
        out_shape=[
            jax.ShapeDtypeStruct((*result.shape[:-1], width + more), result.dtype)
            for result in map(_plain, results)
        ],
        compiler_params=triton.CompilerParams(num_warps=1),
        interpret=schedule.interpret,
    )(*map(pad, arrays))
    return [array[..., :width] for array in padded]


def _plain(array: Array) -> jax.Array:
    return array.array if isinstance(array, (Before, PerStep, PerChunk)) else array
