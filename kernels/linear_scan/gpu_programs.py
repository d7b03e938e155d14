"""How Pallas kernels for GPU go through sequences, whatever compiles them.

A program takes neighbouring channels of one row, one or two for each thread, through
time in groups of steps: the loads of a group are issued together, before the arithmetic
of the group ahead of it, so that their latencies overlap with each other and with that.
Where rows and channels are too few to fill the chip, time is cut into chunks that run
side by side. `gpu_blocks.py` says how many of each.

A back end is a module with `call`, which runs a kernel, and `ARITHMETIC`, which kernels
compute with: `triton_programs.py` and `mosaic_programs.py`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

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


PLAIN = Arithmetic(
    multiply_add=lambda a, b, c: a * b + c,
    exp2=jnp.exp2,
    reciprocal=lambda a: 1.0 / a,
    rsqrt=jax.lax.rsqrt,
)


TRITON, MOSAIC = (f"{__package__}.{name}_programs" for name in ("triton", "mosaic"))
"""Back ends: names of their modules, imported when they are used."""


class Schedule(NamedTuple):
    """How programs go through time.

    Attributes:
      length: T.
      chunk: number of steps of a chunk; the last one may have fewer.
      chunks: number of chunks.
      channels: number of channels of a program.
      unroll: number of steps of a group.
      reverse: whether from the last step to the first.
      interpret: whether the kernels are interpreted.
      backend: `TRITON` or `MOSAIC`.
    """

    length: int
    chunk: int
    chunks: int
    channels: int
    unroll: int
    reverse: bool
    interpret: bool
    backend: str

    @property
    def module(self) -> Any:
        """The back end."""
        return importlib.import_module(self.backend)

    @property
    def arithmetic(self) -> Arithmetic:
        """What kernels compute with."""
        return PLAIN if self.interpret else self.module.ARITHMETIC

    def full(self, value: float) -> jax.Array:
        """The channels of a program, float32, all of this value."""
        if self.interpret:
            return jnp.full([self.channels], value, jnp.float32)
        return self.module.full(self.channels, value)


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
    arrays: Sequence[jax.Array],
    blocks: GpuBlocks,
    reverse: bool,
    interpret: bool,
    backend: str = TRITON,
) -> Schedule:
    """How to go through these sequences [B, T, D]."""
    batch, length, width = arrays[0].shape

    def in_one_pass(channels):
        return batch * pl.cdiv(width, channels)

    blocks = importlib.import_module(backend).widen(blocks)
    # Narrow programs where they spare the second pass.
    possible, programs, unroll = blocks.channels, blocks.programs, blocks.unroll
    enough = [channels for channels in possible if in_one_pass(channels) >= programs]
    channels = (enough or possible)[0]
    chunks = pl.cdiv(programs, in_one_pass(channels))
    chunks = min(chunks, max(length // blocks.shortest_chunk, 1))
    chunk = min(pl.cdiv(length, chunks * unroll) * unroll, length)
    chunks = pl.cdiv(length, chunk)
    return Schedule(
        length, chunk, chunks, channels, unroll, reverse, interpret, backend
    )


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
        return [
            tuple(load.fetch(row) for load in loads) for row in rows_from(start, steps)
        ]

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
    of what is the same in all rows [D] and of what is `Before`, and [chunk] of what is
    `PerStep`. Of what is `PerChunk` it reads all, [chunks, channels], and writes its
    part, [channels].

    Args:
      kernel: takes the refs.
      name: name of the kernel.
      arrays: what it reads; the first is a sequence.
      results: what its results look like.
      schedule: how time is taken.
    """
    width = plain(arrays[0]).shape[2]
    more = -width % schedule.channels
    padded = schedule.module.call(
        kernel,
        name,
        [_widened(array, more) for array in arrays],
        [_widened_like(result, more) for result in results],
        schedule,
    )
    return [array[..., :width] for array in padded]


def _widened(array, more):
    """The array with whole blocks of channels; those past the last are zeros."""
    if isinstance(array, PerStep):
        return array
    values = plain(array)
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, more)])
    return array._replace(array=values) if isinstance(array, WRAPPED) else values


def _widened_like(result, more):
    like = plain(result)
    like = jax.ShapeDtypeStruct((*like.shape[:-1], like.shape[-1] + more), like.dtype)
    return result._replace(array=like) if isinstance(result, WRAPPED) else like


WRAPPED = (Before, PerStep, PerChunk)


def plain(array: Array) -> jax.Array:
    """The array itself."""
    return array.array if isinstance(array, WRAPPED) else array
