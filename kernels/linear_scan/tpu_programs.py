"""How Pallas kernels for TPU go through sequences.

The grid is (channels, batch, time); time is innermost and runs in order, and a state
stays in on-chip memory from one block of time to the next. The arrays keep the layout
[B, T, D] that they have.

Inside a block, time runs one step after another on rows of all its channels. A row of
1024 channels fills a register: it takes one sublane from each of eight neighbouring
tiles. So one sequence fills the registers as well as eight. Steps are handled in groups
of a tile's height; a group is first widened to float32 in scratch where its dtype is
narrower, or where the sequence ends inside a group.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recurrentgemma.kernels.linear_scan.block_sizes import LANES, TILE, Blocks
from recurrentgemma.kernels.precision import kernel_precision_of

States = list[jax.Array]
"""For each row of a block, the carry [1, width], float32."""


class Before(NamedTuple):
    """A sequence of which a program sees the group of steps before its block."""

    array: jax.Array


class PerStep(NamedTuple):
    """An array [B, T], the same in all channels.

    A program sees a tile [rows, 1, lanes], with its block of time and maybe others.
    """

    array: jax.Array


class Blocked(NamedTuple):
    """An array, or the shape of a result, with a block spec for it."""

    array: Any
    spec: pl.BlockSpec


def call(
    kernel: Callable[..., None],
    name: str,
    arrays: Sequence[Any],
    results: Sequence[Any],
    blocks: Blocks,
    scratch: Sequence[int | Any],
    *,
    operations: tuple[int, int],
    interpret: Any,
) -> list[jax.Array]:
    """Runs a kernel for all blocks of channels, of rows and of time.

    Its refs are [rows, steps, width] of sequences [B, T, D], and [rows, 1, width] of
    states [B, D] and of what is the same in all rows [D].

    Args:
      kernel: takes refs of the arrays, the results and the scratch, and `blocks`.
      name: name of the kernel.
      arrays: what it reads, the first a sequence; see also the classes above.
      results: what its results look like.
      blocks: blocks of the arrays.
      scratch: its memory; a number is that of float32 steps of every row of a block.
      operations: flops and transcendental functions for each element of a sequence.
      interpret: as for `pallas_call`.
    """
    batch, length, width = arrays[0].shape
    operands = [array for array in arrays if not isinstance(array, Before)]
    moved = map(_plain, (*operands, *results))
    found = pl.pallas_call(
        partial(kernel, blocks=blocks),
        name=name,
        grid=(
            pl.cdiv(width, blocks.width),
            batch // blocks.rows,
            pl.cdiv(length, blocks.steps),
        ),
        in_specs=[_spec(array, blocks) for array in arrays],
        out_specs=[_spec(result, blocks) for result in results],
        out_shape=[
            jax.ShapeDtypeStruct(_with_rows(result.shape), result.dtype)
            for result in map(_plain, results)
        ],
        scratch_shapes=[
            pltpu.VMEM((blocks.rows, memory, blocks.width), jnp.float32)
            if isinstance(memory, int)
            else memory
            for memory in scratch
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=cost(batch * length * width, *operations, *moved),
        interpret=interpret,
    )(*(_in_rows(_plain(array), batch) for array in arrays))
    return [
        array.reshape(_plain(result).shape)
        for array, result in zip(found, results, strict=True)
    ]


def _plain(array):
    return array.array if isinstance(array, Before | PerStep | Blocked) else array


def _with_rows(shape):
    """[B, D] as [B, 1, D]: any rows of it are a block, whatever a tile's height is."""
    return (shape[0], 1, shape[1]) if len(shape) == 2 else shape


def _in_rows(array, batch):
    if array.ndim == 1:
        array = jnp.broadcast_to(array[None], (batch, *array.shape))
    return array.reshape(_with_rows(array.shape))


def _spec(array, blocks: Blocks) -> pl.BlockSpec:
    rows, steps, width, group, length, reverse = blocks
    last = pl.cdiv(length, steps) - 1

    def of_sequence(height, index):
        def time(t):
            return index(last - t if reverse else t)

        return pl.BlockSpec((rows, height, width), lambda c, b, t: (b, time(t), c))

    match array:
        case Blocked():
            return array.spec
        case Before():
            return of_sequence(
                group, lambda t: jnp.maximum(t * (steps // group) - 1, 0)
            )
        case PerStep():
            lanes = min(length, LANES)

            def tile(c, b, t):
                del c
                t = last - t if reverse else t
                return b, 0, jax.lax.div(t * steps, lanes)

            return pl.BlockSpec((rows, 1, lanes), tile)
    if len(array.shape) < 3:
        return pl.BlockSpec((rows, 1, width), lambda c, b, t: (b, 0, c))
    return of_sequence(steps, lambda t: t)


def cost(
    size: int, flops: int, transcendentals: int, *moved: jax.Array
) -> pl.CostEstimate:
    """What the compiler is told of a kernel: it schedules other work beside it."""
    return pl.CostEstimate(
        flops=flops * size,
        transcendentals=transcendentals * size,
        bytes_accessed=sum(
            math.prod(array.shape) * array.dtype.itemsize for array in moved
        ),
    )


def dot(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int):
    """The product that sums over one axis of each matrix, float32.

    Its precision is that of `kernels/precision.py`. Operands are widened, which changes
    no digit: kernels for TPU v2 and v3 multiply float32 alone. The product of two
    bfloat16 operands still takes one pass (0.4 % more bundles on v5e by the compiler's
    count).
    """
    return jax.lax.dot_general(
        left.astype(jnp.float32),
        right.astype(jnp.float32),
        (((left_axis,), (right_axis,)), ((), ())),
        precision=kernel_precision_of(left, right),
        preferred_element_type=jnp.float32,
    )


def time_block(blocks: Blocks) -> jax.Array:
    """Index in the array of the block of time that this step of the grid handles."""
    step = pl.program_id(2)
    return pl.num_programs(2) - 1 - step if blocks.reverse else step


def for_each_group(
    group: Callable[[jax.Array, jax.Array, States], None],
    initial: Any,
    carried: Any,
    blocks: Blocks,
) -> None:
    """Runs `group(start, first, states)` over the groups of a block that hold steps.

    Args:
      group: handles the steps of a block from `start` on, which are those of the
        sequence from `first` on; replaces the states.
      initial: ref of the states before the first step [rows, 1, width].
      carried: output ref of the same shape; holds the states from block to block.
      blocks: blocks of the arrays.
    """

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = initial[...]

    groups: Any = blocks.steps // blocks.group
    first = time_block(blocks) * blocks.steps
    if blocks.length % blocks.steps:
        left = blocks.length - first
        groups = jnp.minimum(groups, pl.cdiv(left, blocks.group))

    def body(i, carry):
        index = groups - 1 - i if blocks.reverse else i
        start = pl.multiple_of(index * blocks.group, blocks.group)
        states = list(carry)
        group(start, first + start, states)
        return tuple(states)

    states = tuple(carried[i] for i in range(blocks.rows))
    states = jax.lax.fori_loop(0, groups, body, states)
    for i, state in enumerate(states):
        carried[i] = state


def scan_steps(inputs, decays, output, wide, states: States, reverse=False) -> None:
    """h_t = a_t h_{t-1} + x_t over a group, for each row of a block.

    All are refs of the group [rows, group, width], float32 but for the output; `wide`
    holds the results where that is narrower. The states are replaced.
    """
    direct = output.dtype == jnp.float32
    result = output if direct else wide
    rows, group, width = result.shape
    for step in range(group)[:: -1 if reverse else 1]:
        for i in range(rows):
            now = (i, pl.ds(step, 1), slice(None))
            states[i] = decays[now] * states[i] + inputs[now]
            result[now] = states[i]
    if not direct:
        for at in tiles(rows, width):
            output[at] = result[at].astype(output.dtype)


def adjoint_steps(gradients, decays, results, states: States) -> None:
    """g_t = dy_t + c_{t+1} and c_t = a_t g_t over a group, the last step first."""
    rows, group, _ = results.shape
    for step in reversed(range(group)):
        for i in range(rows):
            now = (i, pl.ds(step, 1), slice(None))
            gradient = gradients[now] + states[i]
            results[now] = gradient
            states[i] = decays[now] * gradient


def inside_sequence(first, blocks: Blocks) -> jax.Array | None:
    """Which steps of the group from `first` on exist [group, width]; None if all do."""
    if blocks.length % blocks.group == 0:
        return None
    shape = (blocks.group, blocks.width)
    step = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return first + step < blocks.length


def widened(source, scratch, inside: jax.Array | None, outside: float):
    """A float32 ref of a group's values: the source itself, or a copy in scratch.

    Where `inside` is False the values are `outside`: past its end an array holds
    anything, NaN included.
    """
    if source.dtype == jnp.float32 and inside is None:
        return source
    for i, steps, slab in tiles(scratch.shape[0], scratch.shape[-1]):
        values = source[i, steps, slab].astype(jnp.float32)
        if inside is not None:
            values = jnp.where(inside[:, slab], values, outside)
        scratch[i, steps, slab] = values
    return scratch


def prepare_edge(edge, y_before, h0, blocks: Blocks) -> None:
    """Puts the states before a block's first step in the last row of a scratch tile.

    They come from the group before the block or from h0; refs start with the rows.
    """
    for i in range(blocks.rows):
        state = jnp.broadcast_to(h0[i], edge.shape[1:])
        if blocks.length > blocks.steps:
            tail = y_before[i].astype(jnp.float32)[blocks.group - TILE :]
            state = jnp.where(time_block(blocks) == 0, state, tail)
        edge[i] = state


def load_states(wide_y, y, edge, start, blocks: Blocks) -> None:
    """Loads a group of states, and in row TILE - 1 the state before it, in float32."""
    group = blocks.group
    aligned = pl.multiple_of(jnp.maximum(start - group, 0), group)
    for i, _, slab in tiles(blocks.rows, blocks.width):
        before = edge[i, :, slab]
        if blocks.steps > group:
            tail = y[i, pl.ds(aligned, group), slab].astype(jnp.float32)
            before = jnp.where(start == 0, before, tail[group - TILE :])
        wide_y[i, pl.ds(0, TILE), slab] = before
        state = y[i, pl.ds(start, group), slab].astype(jnp.float32)
        wide_y[i, pl.ds(TILE, group), slab] = state


def tiles(rows: int, width: int) -> Iterator[tuple[int, slice, slice]]:
    """Indices of a group's tiles, which pass one by one: nothing leaves registers."""
    for i in range(rows):
        for c in range(0, width, LANES):
            yield i, slice(None), slice(c, min(c + LANES, width))
