"""How Pallas kernels for GPU go through sequences, by Triton.

A program takes neighbouring channels of one row, one or two for each thread of a warp,
through time in groups of steps: the loads of a group are issued together, before the
arithmetic of the group ahead of it, so that their latencies overlap with each other and
with that. Where rows and channels are too few to fill the chip, time is cut into chunks
that run side by side. `gpu_blocks.py` says how many of each.

All that is particular to the Triton back end, which wants compute capability 8.0, is
`Arithmetic` and `call`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from recurrentgemma.kernels.linear_scan.gpu_blocks import GpuBlocks


class Load(NamedTuple):
    """How a kernel reads an array at a step.

    Attributes:
      fetch: function of the row of the chunk; the values as they lie in memory, for
        which nothing waits yet.
      finish: function of the row and of these values; those that the step takes.
    """

    fetch: Callable[[Any], jax.Array]
    finish: Callable[[Any, jax.Array], jax.Array]


class Arithmetic(NamedTuple):
    """Operations on float32 arrays, each one instruction."""

    multiply_add: Callable[[Any, Any, Any], jax.Array]
    exp2: Callable[[jax.Array], jax.Array]
    reciprocal: Callable[[jax.Array], jax.Array]
    rsqrt: Callable[[jax.Array], jax.Array]


def _instruction(name):
    def run(*arrays):
        shape = jnp.broadcast_shapes(*map(jnp.shape, arrays))
        results = triton.elementwise_inline_asm(
            f"{name} {', '.join(f'${i}' for i in range(len(arrays) + 1))};",
            args=[jnp.broadcast_to(jnp.float32(array), shape) for array in arrays],
            constraints=",".join(["=f", *["f"] * len(arrays)]),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
        )
        return results[0]

    return run


INSTRUCTIONS = Arithmetic(
    multiply_add=_instruction("fma.rn.f32"),
    exp2=_instruction("ex2.approx.ftz.f32"),
    reciprocal=_instruction("rcp.approx.ftz.f32"),
    rsqrt=_instruction("rsqrt.approx.ftz.f32"),
)
"""Triton itself fuses no product with a sum and takes nine for an exponential, which
doubles the recurrent unit's. They err by two units in the last place at most."""
PLAIN = Arithmetic(
    multiply_add=lambda a, b, c: a * b + c,
    exp2=jnp.exp2,
    reciprocal=lambda a: 1.0 / a,
    rsqrt=jax.lax.rsqrt,
)


class Schedule(NamedTuple):
    """How programs go through time.

    Attributes:
      length: T.
      chunk: steps of a chunk; the last one may have fewer.
      chunks: how many there are.
      channels: of a program.
      unroll: steps handled together.
      reverse: whether from the last step to the first.
      interpret: whether the kernels are interpreted.
    """

    length: int
    chunk: int
    chunks: int
    channels: int
    unroll: int
    reverse: bool
    interpret: bool

    @property
    def arithmetic(self) -> Arithmetic:
        """What kernels compute with."""
        return PLAIN if self.interpret else INSTRUCTIONS


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


def choose_schedule(
    arrays: Sequence[jax.Array], blocks: GpuBlocks, reverse: bool, interpret: bool
) -> Schedule:
    """How to go through these sequences [B, T, D]."""
    batch, length, width = arrays[0].shape

    def in_one_pass(channels):
        return batch * pl.cdiv(width, channels)

    # Narrow programs where they spare the second pass.
    possible, programs, unroll = blocks.channels, blocks.programs, blocks.unroll
    enough = [channels for channels in possible if in_one_pass(channels) >= programs]
    channels = (enough or possible)[0]
    chunks = pl.cdiv(programs, in_one_pass(channels))
    chunks = min(chunks, max(length // blocks.shortest_chunk, 1))
    chunk = min(pl.cdiv(length, chunks * unroll) * unroll, length)
    chunks = pl.cdiv(length, chunk)
    return Schedule(length, chunk, chunks, channels, unroll, reverse, interpret)


def load(ref) -> Load:
    """A step of a sequence's ref in float32, or of a `PerStep`'s as it is."""
    if ref.ndim == 1:
        return Load(lambda row: ref[row], lambda _, value: value)
    return Load(lambda row: ref[row, :], lambda _, value: value.astype(jnp.float32))


def load_before(y, y_before, h0) -> Load:
    """The state before a step, from refs of the states, of `Before` them and of h0."""
    starts = pl.program_id(2) == 0
    edge = jnp.where(starts, h0[...], y_before[...].astype(jnp.float32))
    return Load(
        lambda row: y[jnp.maximum(row - 1, 0), :],
        lambda row, earlier: jnp.where(row == 0, edge, earlier.astype(jnp.float32)),
    )


def for_each_step(
    step: Callable[[Any, tuple], tuple[Any, tuple]],
    carry: Any,
    loads: Sequence[Load],
    outputs: Sequence,
    schedule: Schedule,
) -> Any:
    """Runs `step(carry, inputs_t) -> carry, outputs_t` over the chunk of this program.

    Steps go in groups of `unroll`. While a group is computed, the inputs of the next one
    are under way: they are fetched before, and carried to it. The steps after the last
    whole group go one by one.
    """
    unroll = schedule.unroll
    left = schedule.length - pl.program_id(2) * schedule.chunk
    count = jnp.minimum(schedule.chunk, left)
    groups = count // unroll

    def rows_from(start, steps):
        """The steps from the `start`-th on, in the order of time's direction."""
        rows = [start + i for i in range(steps)]
        return [count - 1 - row if schedule.reverse else row for row in rows]

    def fetch(start, steps):
        return [tuple(load.fetch(row) for load in loads) for row in rows_from(start, steps)]

    def compute(start, fetched, carry):
        rows = rows_from(start, len(fetched))
        for row, values in zip(rows, fetched, strict=True):
            inputs = [
                load.finish(row, value)
                for load, value in zip(loads, values, strict=True)
            ]
            carry, results = step(carry, tuple(inputs))
            for ref, result in zip(outputs, results, strict=True):
                ref[row, :] = result.astype(ref.dtype)
        return carry

    def run_group(i, state):
        carry, fetched = state
        # The last group fetches itself again, from the nearest cache, for nobody.
        following = fetch(jnp.minimum(i + 1, groups - 1) * unroll, unroll)
        return compute(i * unroll, fetched, carry), following

    def run_groups(carry):
        state = carry, fetch(0, unroll)
        return jax.lax.fori_loop(0, groups, run_group, state)[0]

    # A chunk shorter than a group must not be read as one.
    carry = jax.lax.cond(groups > 0, run_groups, lambda carry: carry, carry)
    return jax.lax.fori_loop(
        groups * unroll, count, lambda i, carry: compute(i, fetch(i, 1), carry), carry
    )


def first_state(h0, products, ends, schedule: Schedule) -> jax.Array:
    """The state before this program's chunk, from refs."""
    last = schedule.chunks - 1
    if last == 0:
        return h0[...]
    chunk = pl.program_id(2)
    earlier = last - chunk if schedule.reverse else chunk
    # Loads of some chunks are in flight together, whether these are earlier or not.
    together = min(schedule.unroll, last)

    def carry_over(group, h):
        for i in range(together):
            number = jnp.minimum(group * together + i, last)
            index = last - number if schedule.reverse else number
            after = products[index, :] * h + ends[index, :]
            h = jnp.where(number < earlier, after, h)
        return h

    return jax.lax.fori_loop(0, pl.cdiv(earlier, together), carry_over, h0[...])


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

    It gets refs [chunk, channels] of sequences [B, T, D], [channels] of states [B, D],
    of what is the same in all rows [D] and of what is `Before`, and [chunk] of what is `PerStep`. Of what is `PerChunk` it
    reads all, [chunks, channels], and writes its own, [channels].

    Args:
      kernel: takes the refs.
      name: of the kernel.
      arrays: what it reads; the first is a sequence.
      results: what its results look like.
      schedule: how time is taken.
    """
    batch, _, width = plain(arrays[0]).shape
    chunk, chunks, channels = schedule.chunk, schedule.chunks, schedule.channels
    more = -width % channels

    def of_sequence(rows, index):
        return pl.BlockSpec((None, rows, channels), lambda d, b, c: (b, index(c), d))

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
        if len(array.shape) < 3:
            return pl.BlockSpec((None, channels), lambda d, b, c: (b, d))
        return of_sequence(chunk, lambda c: c)

    def pad(array):
        if isinstance(array, PerStep):
            return array.array
        array = plain(array)
        if array.ndim == 1:
            array = jnp.broadcast_to(array[None], (batch, width))
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)])

    padded = pl.pallas_call(
        kernel,
        name=name,
        grid=((width + more) // channels, batch, chunks),
        in_specs=[spec(array, False) for array in arrays],
        out_specs=[spec(result, True) for result in results],
        out_shape=[
            jax.ShapeDtypeStruct((*result.shape[:-1], width + more), result.dtype)
            for result in map(plain, results)
        ],
        compiler_params=triton.CompilerParams(num_warps=1),
        interpret=schedule.interpret,
    )(*map(pad, arrays))
    return [array[..., :width] for array in padded]


def plain(array: Array) -> jax.Array:
    """The array itself."""
    return array.array if isinstance(array, (Before, PerStep, PerChunk)) else array
