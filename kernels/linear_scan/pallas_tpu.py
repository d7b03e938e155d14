"""The linear scan as a Pallas kernel for TPU: each array is read or written once.

The grid is (channels, batch, time); time is innermost and runs in order, and the state
stays in on-chip memory from one block of time to the next. The arrays keep the layout
[B, T, D] that they have.

Inside a block, time runs one step after another on rows of all its channels. A row of
1024 channels fills a register: it takes one sublane from each of eight neighbouring
tiles. So one sequence fills the registers as well as eight. Steps are handled in groups
of a tile's height; a group is first widened to float32 in scratch where its dtype is
narrower, or where the sequence ends inside a group.

The gradient is one pass in the other direction, with c_T the gradient of h_last:
    g_t = dy_t + c_{t+1}     c_t = a_t g_t
    grad_x_t = g_t           grad_a_t = g_t y_{t-1}           grad_h0 = c_0
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recurrentgemma.kernels.linear_scan.block_sizes import (
    LANES,
    BlockSizes,
    block_sizes,
)
from recurrentgemma.kernels.precision import kernel_precision_of

TILE = 8
"""Rows of a float32 tile."""

COMPILER_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary")
)

States = list[jax.Array]
"""For each row of a block, the carry [1, width], float32."""


def _scan_kernel(x, a, h0, y, h, wide_x, wide_a, wide_y, *, length, reverse, sizes):
    block = time_block(reverse)

    def group(start: jax.Array, states: States) -> States:
        steps = pl.ds(start, sizes.group)
        inside = inside_sequence(block, start, length, sizes)
        rows = range(sizes.rows)
        scan_steps(
            [widened(x.at[i, steps], wide_x.at[i], inside, 0.0) for i in rows],
            [widened(a.at[i, steps], wide_a.at[i], inside, 1.0) for i in rows],
            [y.at[i, steps] for i in rows],
            [wide_y.at[i] for i in rows],
            states,
            reverse,
        )
        return states

    for_each_group(group, block, h0, h, length, sizes, reverse)


def _gradient_kernel(
    dy, a, y, y_before, h0, d_last, dx, da, dh, wide_dy, wide_a, wide_y, wide_dx,
    edge, *, length, sizes,
):  # fmt: skip
    block = time_block(reverse=True)
    prepare_edge(edge, y_before, h0, block, length, sizes)

    def group(start: jax.Array, states: States) -> States:
        steps = pl.ds(start, sizes.group)
        inside = inside_sequence(block, start, length, sizes)
        gradients, decays = [], []
        for i in range(sizes.rows):
            gradients.append(widened(dy.at[i, steps], wide_dy.at[i], inside, 0.0))
            decays.append(widened(a.at[i, steps], wide_a.at[i], inside, 1.0))
            load_states(wide_y.at[i], y.at[i], edge.at[i], start, sizes)
        results = [wide_dx.at[i] for i in range(sizes.rows)]
        adjoint_steps(gradients, decays, results, states)
        for i in range(sizes.rows):
            for slab in slabs(sizes.width):
                gradient = wide_dx[i, :, slab]
                dx[i, steps, slab] = gradient.astype(dx.dtype)
                before = wide_y[i, pl.ds(TILE - 1, sizes.group), slab]
                da[i, steps, slab] = (gradient * before).astype(da.dtype)
        return states

    for_each_group(group, block, d_last, dh, length, sizes, reverse=True)


@partial(jax.jit, static_argnames=("reverse", "interpret"))
def scan(
    x: jax.Array,
    a: jax.Array,
    h0: jax.Array,
    reverse: bool,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""
    sizes = block_sizes(x.shape, (x.dtype.itemsize, a.dtype.itemsize, x.dtype.itemsize))
    sequence, state, _ = block_specs(x.shape, sizes, reverse)
    h0 = as_rows(h0)
    y, h_last = pl.pallas_call(
        partial(_scan_kernel, length=x.shape[1], reverse=reverse, sizes=sizes),
        name="linear_scan",
        grid=grid(x.shape, sizes),
        in_specs=[sequence, sequence, state],
        out_specs=[sequence, state],
        out_shape=[like(x), like(h0)],
        scratch_shapes=[group_scratch(sizes)] * 3,
        compiler_params=COMPILER_PARAMS,
        cost_estimate=cost(2 * x.size, 0, x, a, h0, x, h0),
        interpret=interpret,
    )(x, a, h0)
    return y, h_last[:, 0]


@partial(jax.jit, static_argnames="interpret")
def gradients(
    a: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, a and h0 of a scan that runs forward.

    Args:
      a, h0, y: two of its arguments, and its result.
      y_gradient, last_gradient: gradients of y and h_last.
      interpret: as for `pallas_call`.
    """
    widths = (a.dtype.itemsize,) * 2 + (y.dtype.itemsize,) * 3
    sizes = block_sizes(y.shape, widths)
    sequence, state, before = block_specs(y.shape, sizes, reverse=True)
    h0 = as_rows(h0)
    arrays = (y_gradient, a, y, y, h0, as_rows(last_gradient))
    scratch = group_scratch(sizes)
    x_gradient, a_gradient, h0_gradient = pl.pallas_call(
        partial(_gradient_kernel, length=y.shape[1], sizes=sizes),
        name="linear_scan_gradient",
        grid=grid(y.shape, sizes),
        in_specs=[sequence, sequence, sequence, before, state, state],
        out_specs=[sequence, sequence, state],
        out_shape=[like(y), like(a), like(h0)],
        scratch_shapes=[
            scratch,
            scratch,
            group_scratch(sizes, TILE),
            scratch,
            pltpu.VMEM((sizes.rows, TILE, sizes.width), jnp.float32),
        ],
        compiler_params=COMPILER_PARAMS,
        cost_estimate=cost(3 * y.size, 0, *arrays[:3], y, a, h0, h0, h0),
        interpret=interpret,
    )(*arrays)
    return x_gradient, a_gradient, h0_gradient[:, 0]


def as_rows(state: jax.Array) -> jax.Array:
    """[B, D] as [B, 1, D]: any rows of it are a block, whatever a tile's height is."""
    return state[:, None]


def grid(shape: tuple[int, ...], sizes: BlockSizes) -> tuple[int, int, int]:
    """Blocks of channels, of rows and of time."""
    batch, length, width = shape
    return (
        pl.cdiv(width, sizes.width),
        batch // sizes.rows,
        pl.cdiv(length, sizes.steps),
    )


def block_specs(
    shape: tuple[int, ...], sizes: BlockSizes, reverse: bool
) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """For sequences [B, T, D], states [B, 1, D], and the group before a block."""
    blocks = pl.cdiv(shape[1], sizes.steps)
    groups = sizes.steps // sizes.group

    def time(t):
        return blocks - 1 - t if reverse else t

    return (
        pl.BlockSpec(
            (sizes.rows, sizes.steps, sizes.width), lambda c, b, t: (b, time(t), c)
        ),
        pl.BlockSpec((sizes.rows, 1, sizes.width), lambda c, b, t: (b, 0, c)),
        pl.BlockSpec(
            (sizes.rows, sizes.group, sizes.width),
            lambda c, b, t: (b, jnp.maximum(time(t) * groups - 1, 0), c),
        ),
    )


def group_scratch(sizes: BlockSizes, more_steps: int = 0):
    """Memory for a group of every row of a block, in float32."""
    return pltpu.VMEM((sizes.rows, sizes.group + more_steps, sizes.width), jnp.float32)


def like(array: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a result that is like `array`."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def cost(flops: int, transcendentals: int, *moved: jax.Array) -> pl.CostEstimate:
    """What the compiler is told of a kernel: it schedules other work beside it."""
    return pl.CostEstimate(
        flops=flops,
        transcendentals=transcendentals,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
    )


def dot(left: jax.Array, right: jax.Array, dimensions: Any) -> jax.Array:
    """`dot_general` of a kernel, float32; its precision is that of `kernels/precision.py`.

    Operands are widened, which changes no digit: kernels for TPU v2 and v3 multiply
    float32 alone. The product of two bfloat16 operands still takes one pass (0.4 % more
    bundles on v5e by the compiler's count).
    """
    return jax.lax.dot_general(
        left.astype(jnp.float32),
        right.astype(jnp.float32),
        dimensions,
        precision=kernel_precision_of(left, right),
        preferred_element_type=jnp.float32,
    )


def for_each_group(
    group: Callable[[jax.Array, States], States],
    block: jax.Array,
    initial: Any,
    carried: Any,
    length: int,
    sizes: BlockSizes,
    reverse: bool,
) -> None:
    """Runs `group(start, states) -> states` over the groups of a block that hold steps.

    Args:
      group: handles the steps of a block from `start` on.
      block: which block of time this is, in the order of the array.
      initial: ref of the states before the first step [rows, 1, width].
      carried: output ref of the same shape; holds the states from block to block.
      length: T.
      sizes: block sizes.
      reverse: whether time runs backwards.
    """

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = initial[...]

    groups: Any = sizes.steps // sizes.group
    if length % sizes.steps:
        left = length - block * sizes.steps
        groups = jnp.minimum(groups, pl.cdiv(left, sizes.group))

    def body(i, states):
        index = groups - 1 - i if reverse else i
        start = pl.multiple_of(index * sizes.group, sizes.group)
        return tuple(group(start, list(states)))

    states = tuple(carried[i] for i in range(sizes.rows))
    states = jax.lax.fori_loop(0, groups, body, states)
    for i, state in enumerate(states):
        carried[i] = state


def scan_steps(inputs, decays, outputs, wide, states: States, reverse=False) -> None:
    """h_t = a_t h_{t-1} + x_t over a group, for each row of a block.

    Args:
      inputs, decays: float32 refs of the group [group, width].
      outputs: refs of its results, of any dtype.
      wide: float32 refs that hold the results where `outputs` are narrower.
      states: before the group; replaced by those after it.
      reverse: whether time runs backwards.
    """
    direct = outputs[0].dtype == jnp.float32
    results = outputs if direct else wide
    for step in range(results[0].shape[0])[:: -1 if reverse else 1]:
        now = pl.ds(step, 1)
        for i, state in enumerate(states):
            states[i] = decays[i][now, :] * state + inputs[i][now, :]
            results[i][now, :] = states[i]
    if not direct:
        for output, result in zip(outputs, results, strict=True):
            for slab in slabs(result.shape[1]):
                output[:, slab] = result[:, slab].astype(output.dtype)


def adjoint_steps(gradients, decays, results, states: States) -> None:
    """g_t = dy_t + c_{t+1} and c_t = a_t g_t over a group, the last step first."""
    for step in reversed(range(results[0].shape[0])):
        now = pl.ds(step, 1)
        for i, c in enumerate(states):
            gradient = gradients[i][now, :] + c
            results[i][now, :] = gradient
            states[i] = decays[i][now, :] * gradient


def time_block(reverse: bool) -> jax.Array:
    """Index in the array of the block of time that this step of the grid handles."""
    step = pl.program_id(2)
    return pl.num_programs(2) - 1 - step if reverse else step


def inside_sequence(block, start, length: int, sizes: BlockSizes) -> jax.Array | None:
    """Which steps of a group exist [group, width]; None if all do."""
    if length % sizes.group == 0:
        return None
    step = jax.lax.broadcasted_iota(jnp.int32, (sizes.group, sizes.width), 0)
    return block * sizes.steps + start + step < length


def widened(source, scratch, inside: jax.Array | None, outside: float):
    """A float32 ref of a group's values: the source itself, or a copy in scratch.

    Where `inside` is False the values are `outside`: past its end an array holds
    anything, NaN included.
    """
    if source.dtype == jnp.float32 and inside is None:
        return source
    for slab in slabs(scratch.shape[-1]):
        values = source[:, slab].astype(jnp.float32)
        if inside is not None:
            values = jnp.where(inside[:, slab], values, outside)
        scratch[:, slab] = values
    return scratch


def prepare_edge(edge, y_before, h0, block, length: int, sizes: BlockSizes) -> None:
    """Puts the state before a block's first step in the last row of `edge` [i].

    Args:
      edge: scratch [rows, TILE, width].
      y_before: the group before the block [rows, group, width].
      h0: states before the sequence [rows, 1, width].
      block: index of the block of time.
      length: T.
      sizes: block sizes.
    """
    for i in range(sizes.rows):
        state = jnp.broadcast_to(h0[i], edge.shape[1:])
        if length > sizes.steps:
            tail = y_before[i].astype(jnp.float32)[sizes.group - TILE :]
            state = jnp.where(block == 0, state, tail)
        edge[i] = state


def load_states(wide_y, y, edge, start, sizes: BlockSizes) -> None:
    """Loads a group of states, and in row TILE - 1 the state before it, in float32."""
    group = sizes.group
    steps = pl.ds(start, group)
    aligned = pl.multiple_of(jnp.maximum(start - group, 0), group)
    for slab in slabs(sizes.width):
        before = edge[:, slab]
        if sizes.steps > group:
            tail = y[pl.ds(aligned, group), slab].astype(jnp.float32)[group - TILE :]
            before = jnp.where(start == 0, before, tail)
        wide_y[pl.ds(0, TILE), slab] = before
        wide_y[pl.ds(TILE, group), slab] = y[steps, slab].astype(jnp.float32)


def slabs(width: int) -> list[slice]:
    """Cuts the channels of a block into tiles, so that nothing leaves registers."""
    return [slice(c, min(c + LANES, width)) for c in range(0, width, LANES)]
