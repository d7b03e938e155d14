"""RG-LRU as a Pallas kernel for TPU: gates, decay, input factor and scan in one pass.

Grid, layout and the steps in time are those of the linear scan's kernel. Here a group of
steps first passes through the gates, on whole tiles, which leave decays and scan inputs
in scratch; then the scan takes it row by row.

Padding and document starts become data of the scan: a held step has decay 1 and input 0,
a start has decay 0 and input factor 1. So does what lies past the end of the sequence,
which is held. Positions come with time along the lanes; a masked sum along the lanes
turns a group of them into a column.

The gradient recomputes the gates from the arguments, takes the states from the result,
and runs in the other direction (`linear_scan/pallas_tpu.py` has the equations).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recurrentgemma.kernels.linear_scan import pallas_tpu as linear_scan
from recurrentgemma.kernels.linear_scan.block_sizes import LANES, BlockSizes
from recurrentgemma.kernels.linear_scan.block_sizes import block_sizes as _block_sizes
from recurrentgemma.kernels.rg_lru.reference import (
    DECAY_SCALE,
    SMALLEST_RADICAND,
    log_decay,
)

TILE = linear_scan.TILE
SERIES_BELOW = 1 / 16
"""Where -log a is smaller, 1 - a is a series. An exponential is off by some units in the
last place of 1 on TPU: of 1 - a = 1e-6 that is a tenth, and so of the memory."""
SERIES = (1.0, -1 / 2, 1 / 6, -1 / 24)
"""Coefficients of (1 - exp(-v)) / v. The next term, v^4 / 120, is at most 1.3e-7."""
MOST_NEGATIVE_LOGIT = -40.0
"""Logits below it count as it: a gate of 4e-18. Products of exponentials stay finite."""
SMALLEST_ROOT = 1e-30
"""Keeps the reciprocal of a square root finite."""
HOLD, START, STEP = -1.0, 0.0, 1.0
"""The three kinds of step."""


def _kernel(
    x, recurrence, input_, a_param, positions, h0, y, h, wide_a, wide_x, wide_y,
    log_decays, *, length, sizes,
):  # fmt: skip
    block = linear_scan.time_block(reverse=False)
    log_decays[...] = log_decay(a_param[...])

    def group(start, states):
        steps = pl.ds(start, sizes.group)
        for i in range(sizes.rows):
            kinds = step_kinds(positions[i], block, start, length, sizes)
            for slab in linear_scan.slabs(sizes.width):
                at = (i, steps, slab)
                kind = kinds[:, : slab.stop - slab.start]
                _, gate, a, u = gates(
                    recurrence[at], input_[at], log_decays[i, :, slab]
                )
                wide_a[i, :, slab] = scan_decay(a, kind)
                value = factor(u * inverse_root(u), kind) * gate
                value = value * x[at].astype(jnp.float32)
                wide_x[i, :, slab] = jnp.where(kind == HOLD, 0.0, value)
        rows = range(sizes.rows)
        inputs, decays, wide = (
            [ref.at[i] for i in rows] for ref in (wide_x, wide_a, wide_y)
        )
        outputs = [y.at[i, steps] for i in rows]
        linear_scan.scan_steps(inputs, decays, outputs, wide, states)
        return states

    linear_scan.for_each_group(group, block, h0, h, length, sizes, reverse=False)


def _gradient_kernel(
    dy, x, recurrence, input_, a_param, positions, y, y_before, h0, d_last,
    dx, d_recurrence, d_input, d_a_param, dh,
    wide_dy, wide_a, wide_r, wide_i, wide_u, wide_y, wide_dx, edge, total,
    log_decays, *, length, sizes,
):  # fmt: skip
    block = linear_scan.time_block(reverse=True)
    linear_scan.prepare_edge(edge, y_before, h0, block, length, sizes)
    log_decays[...] = log_decay(a_param[...])
    rows = range(sizes.rows)

    @pl.when(pl.program_id(2) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def group(start, states):
        steps = pl.ds(start, sizes.group)
        kinds = [step_kinds(positions[i], block, start, length, sizes) for i in rows]
        inside = linear_scan.inside_sequence(block, start, length, sizes)
        upstream = []
        for i in rows:
            upstream.append(
                linear_scan.widened(dy.at[i, steps], wide_dy.at[i], inside, 0.0)
            )
            linear_scan.load_states(wide_y.at[i], y.at[i], edge.at[i], start, sizes)
            for slab in linear_scan.slabs(sizes.width):
                at, here = (i, steps, slab), (i, slice(None), slab)
                kind = kinds[i][:, : slab.stop - slab.start]
                wide_r[here], wide_i[here], a, wide_u[here] = gates(
                    recurrence[at], input_[at], log_decays[i, :, slab]
                )
                wide_a[here] = scan_decay(a, kind)
        linear_scan.adjoint_steps(
            upstream,
            [wide_a.at[i] for i in rows],
            [wide_dx.at[i] for i in rows],
            states,
        )
        for i in rows:
            for slab in linear_scan.slabs(sizes.width):
                at, here = (i, steps, slab), (i, slice(None), slab)
                kind = kinds[i][:, : slab.stop - slab.start]
                r, gate, a, u = wide_r[here], wide_i[here], wide_a[here], wide_u[here]
                gradient = wide_dx[here]
                wide_x = x[at].astype(jnp.float32)
                inverse = inverse_root(u)
                held = jnp.where(kind == HOLD, 0.0, gradient)
                x_gradient = held * factor(u * inverse, kind) * gate
                before = wide_y[i, pl.ds(TILE - 1, sizes.group), slab]
                # d sqrt(1 - a^2) / d log a = -a^2 / sqrt(1 - a^2), bounded.
                slope = a * jnp.minimum(inverse, SMALLEST_RADICAND**-0.5)
                d_log_a = a * gradient * (before - gate * wide_x * slope)
                # Where a document starts or the state is held, the gates do not matter.
                per_gate = jnp.where(kind == STEP, d_log_a * r, 0.0)
                total[here] += per_gate
                r_gradient = per_gate * log_decays[i, :, slab] * (1.0 - r)
                dx[at] = x_gradient.astype(dx.dtype)
                d_recurrence[at] = r_gradient.astype(d_recurrence.dtype)
                d_input[at] = (x_gradient * wide_x * (1.0 - gate)).astype(d_input.dtype)
        return states

    linear_scan.for_each_group(group, block, d_last, dh, length, sizes, reverse=True)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for i in rows:
            slope = -DECAY_SCALE * jax.nn.sigmoid(a_param[i].astype(jnp.float32))
            d_a_param[i] = slope * jnp.sum(total[i], axis=0, keepdims=True)


def step_kinds(positions, block, start, length: int, sizes: BlockSizes) -> jax.Array:
    """HOLD, START or STEP for each step of a group, the same in all channels of a tile.

    Args:
      positions: a row of them [1, lanes], for this block of time among others.
      block, start: where the group begins.
      length: T.
      sizes: block sizes.
    """
    shape = (sizes.group, positions.shape[1])
    step = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + start
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    first_lane = jax.lax.rem(block * sizes.steps, positions.shape[1])
    kind = jnp.broadcast_to(jnp.clip(positions.astype(jnp.float32), HOLD, STEP), shape)
    chosen = jnp.where(lane == first_lane + step, kind, 0.0)
    column = jnp.sum(chosen, axis=1, keepdims=True)
    if length % sizes.group:
        past = block * sizes.steps + step[:, :1] >= length
        column = jnp.where(past, HOLD, column)
    return jnp.broadcast_to(column, (sizes.group, min(LANES, sizes.width)))


def gates(recurrence_logits, input_logits, log_decay):
    """r_t, i_t, a_t and 1 - a_t^2, in float32; log_decay is log a_t / r_t."""
    one_over_r, one_over_i = (
        1.0 + jnp.exp(-jnp.maximum(logits.astype(jnp.float32), MOST_NEGATIVE_LOGIT))
        for logits in (recurrence_logits, input_logits)
    )
    # One reciprocal, refined by hand, serves both gates; a division has 13 operations.
    product = one_over_r * one_over_i
    inverse = pl.reciprocal(product, approx=True)
    for _ in range(2):
        inverse = inverse * (2.0 - product * inverse)
    r, i = inverse * one_over_i, inverse * one_over_r
    v = -log_decay * r
    series = jnp.full_like(v, SERIES[-1])
    for coefficient in reversed(SERIES[:-1]):
        series = series * v + coefficient
    near, forgotten, a = v < SERIES_BELOW, v * series, jnp.exp(-v)
    a = jnp.where(near, 1.0 - forgotten, a)
    return r, i, a, jnp.where(near, forgotten * (2.0 - forgotten), 1.0 - a * a)


def inverse_root(u: jax.Array) -> jax.Array:
    """1 / sqrt(u), finite for u = 0."""
    return jax.lax.rsqrt(jnp.maximum(u, SMALLEST_ROOT))


def factor(root: jax.Array, kind: jax.Array) -> jax.Array:
    """What the gated input is multiplied with; a held step still has to drop it."""
    return jnp.where(kind == START, 1.0, root)


def scan_decay(a: jax.Array, kind: jax.Array) -> jax.Array:
    """The decay of the scan."""
    return jnp.where(kind == START, 0.0, jnp.where(kind == HOLD, 1.0, a))


def block_sizes(shape: tuple[int, ...], *dtypes) -> BlockSizes:
    """Those of the scan, with blocks of time that fall into one block of positions."""
    sizes = _block_sizes(shape, tuple(dtype.itemsize for dtype in dtypes))
    return sizes._replace(steps=min(sizes.steps, LANES))


@partial(jax.jit, static_argnames="interpret")
def recurrence(
    x: jax.Array,
    recurrence_logits: jax.Array,
    input_logits: jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`; a_param is [B, E] here, one for each row."""
    arrays = (x, recurrence_logits, input_logits)
    sizes = block_sizes(x.shape, *(array.dtype for array in (*arrays, x)))
    sequence, state, _ = linear_scan.block_specs(x.shape, sizes, reverse=False)
    a_param, positions, h0 = map(linear_scan.as_rows, (a_param, positions, h0))
    arguments = (*arrays, a_param, positions, h0)
    y, h_last = pl.pallas_call(
        partial(_kernel, length=x.shape[1], sizes=sizes),
        name="rg_lru",
        grid=linear_scan.grid(x.shape, sizes),
        in_specs=[*[sequence] * 3, state, positions_spec(x.shape, sizes, False), state],
        out_specs=[sequence, state],
        out_shape=[linear_scan.like(x), linear_scan.like(h0)],
        scratch_shapes=[
            *[linear_scan.group_scratch(sizes)] * 3,
            pltpu.VMEM((sizes.rows, 1, sizes.width), jnp.float32),
        ],
        compiler_params=linear_scan.COMPILER_PARAMS,
        cost_estimate=linear_scan.cost(20 * x.size, 6 * x.size, x, *arguments, h0),
        interpret=interpret,
    )(*arguments)
    return y, h_last[:, 0]


@partial(jax.jit, static_argnames="interpret")
def gradients(
    x: jax.Array,
    recurrence_logits: jax.Array,
    input_logits: jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """See `composed.gradients`."""
    arrays = (y_gradient, x, recurrence_logits, input_logits)
    sizes = block_sizes(x.shape, *(array.dtype for array in (*arrays, y, *arrays[1:])))
    specs = linear_scan.block_specs(x.shape, sizes, reverse=True)
    sequence, state, before = specs
    states = map(linear_scan.as_rows, (a_param, positions, h0, last_gradient))
    a_param, positions, h0, last_gradient = states
    arguments = (*arrays, a_param, positions, y, y, h0, last_gradient)
    position = positions_spec(x.shape, sizes, reverse=True)
    scratch = linear_scan.group_scratch(sizes)
    *of_sequences, a_param_gradient, h0_gradient = pl.pallas_call(
        partial(_gradient_kernel, length=x.shape[1], sizes=sizes),
        name="rg_lru_gradient",
        grid=linear_scan.grid(x.shape, sizes),
        in_specs=[*[sequence] * 4, state, position, sequence, before, state, state],
        out_specs=[*[sequence] * 3, state, state],
        out_shape=[linear_scan.like(array) for array in (*arrays[1:], h0, h0)],
        scratch_shapes=[
            *[scratch] * 5,
            linear_scan.group_scratch(sizes, TILE),
            scratch,
            pltpu.VMEM((sizes.rows, TILE, sizes.width), jnp.float32),
            scratch,
            pltpu.VMEM((sizes.rows, 1, sizes.width), jnp.float32),
        ],
        compiler_params=linear_scan.COMPILER_PARAMS,
        cost_estimate=linear_scan.cost(
            50 * x.size, 6 * x.size, *arguments[:7], *arrays[1:]
        ),
        interpret=interpret,
    )(*arguments)
    return *of_sequences, a_param_gradient[:, 0], h0_gradient[:, 0]


def positions_spec(
    shape: tuple[int, ...], sizes: BlockSizes, reverse: bool
) -> pl.BlockSpec:
    """Block spec of positions [B, 1, T]: a tile of them serves some blocks of time."""
    blocks = pl.cdiv(shape[1], sizes.steps)
    lanes = min(shape[1], LANES)

    def index(c, b, t):
        del c
        time = blocks - 1 - t if reverse else t
        return b, 0, jax.lax.div(time * sizes.steps, lanes)

    return pl.BlockSpec((sizes.rows, 1, lanes), index)
