"""RG-LRU with its gate products inside, as a Pallas kernel for TPU.

Grid and layout are those of the linear scan's kernel; the gate matrices stay in on-chip
memory. A block of time is handled in sweeps: over the diagonal blocks of the gates, then
over time. The first leaves decays and scan inputs of the whole block in scratch, float32;
the second is the scan. All diagonal blocks are in one piece of straight code, so that the
products of one run in the matrix units while the vector units are at the gates of another.
(Their results are more than the registers hold. The compiler spills some, and still the
whole block at once takes fewer cycles by its estimate than halves of it, which spill
less.) The sequence is read once and written once.

The gradient recomputes the gates in the same way, runs the scan in the other direction,
and in a third sweep over the diagonal blocks takes the gradient through the gates and
their products. Gradients of matrices are summed over time in the block of the result.

Apart (`gates.logits`), the products cost more than everything here: the compiler copies
every sequence before and after them. The convolution before the gates stays outside.
Inside it would take 250k cycles more, as its own fusion it takes 375k: by the estimates
for v5e at (8, 2048, 2560) in bfloat16, where a layer takes 25 million.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recurrentgemma.kernels.linear_scan import pallas_tpu as linear_scan
from recurrentgemma.kernels.linear_scan.block_sizes import (
    LANES,
    BlockSizes,
    gate_block_sizes,
)
from recurrentgemma.kernels.rg_lru import pallas_tpu as rg_lru
from recurrentgemma.kernels.rg_lru.pallas_tpu import HOLD, STEP
from recurrentgemma.kernels.rg_lru.reference import (
    DECAY_SCALE,
    SMALLEST_RADICAND,
    log_decay,
)

TILE = linear_scan.TILE


def _kernel(
    x, r_kernel, r_bias, i_kernel, i_bias, a_param, positions, h0, y, h,
    kinds, log_decays, wide_a, wide_x, wide_y, *, length, sizes,
):  # fmt: skip
    block = linear_scan.time_block(reverse=False)
    _prepare(kinds, log_decays, positions, a_param, block, length, sizes)
    weights = (r_kernel, r_bias, i_kernel, i_bias)
    for g, at in _parts(r_kernel, sizes):
        kind = _kind(kinds, at)
        values = _inside(x[at], kind, length, sizes)
        _, gate, a, u = _gates(values, weights, g, log_decays, at)
        wide_a[at] = rg_lru.scan_decay(a, kind)
        gated = rg_lru.factor(u * rg_lru.inverse_root(u), kind) * gate
        gated = gated * values.astype(jnp.float32)
        wide_x[at] = jnp.where(kind == HOLD, 0.0, gated)

    def group(start, states):
        steps = pl.ds(start, sizes.group)
        rows = range(sizes.rows)
        linear_scan.scan_steps(
            [wide_x.at[i, steps] for i in rows],
            [wide_a.at[i, steps] for i in rows],
            [y.at[i, steps] for i in rows],
            [wide_y.at[i] for i in rows],
            states,
        )
        return states

    linear_scan.for_each_group(group, block, h0, h, length, sizes, reverse=False)


def _gradient_kernel(
    dy, x, r_kernel, r_bias, i_kernel, i_bias, a_param, positions, y, y_before, h0,
    d_last, dx, d_r_kernel, d_r_bias, d_i_kernel, d_i_bias, d_a_param, dh,
    kinds, log_decays, wide_r, wide_i, wide_a, wide_u, wide_g, wide_da,
    wide_dy, wide_y, edge, totals, *, length, sizes,
):  # fmt: skip
    block = linear_scan.time_block(reverse=True)
    linear_scan.prepare_edge(edge, y_before, h0, block, length, sizes)
    _prepare(kinds, log_decays, positions, a_param, block, length, sizes)
    weights = (r_kernel, r_bias, i_kernel, i_bias)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in (totals, d_r_kernel, d_i_kernel):
            ref[...] = jnp.zeros_like(ref)

    for g, at in _parts(r_kernel, sizes):
        kind = _kind(kinds, at)
        values = _inside(x[at], kind, length, sizes)
        wide_r[at], wide_i[at], a, wide_u[at] = _gates(
            values, weights, g, log_decays, at
        )
        wide_a[at] = rg_lru.scan_decay(a, kind)

    def group(start, states):
        steps = pl.ds(start, sizes.group)
        rows = range(sizes.rows)
        inside = linear_scan.inside_sequence(block, start, length, sizes)
        upstream = [
            linear_scan.widened(dy.at[i, steps], wide_dy.at[i], inside, 0.0)
            for i in rows
        ]
        for i in rows:
            linear_scan.load_states(wide_y.at[i], y.at[i], edge.at[i], start, sizes)
        decays, results = ([ref.at[i, steps] for i in rows] for ref in (wide_a, wide_g))
        linear_scan.adjoint_steps(upstream, decays, results, states)
        for i in rows:
            for slab in linear_scan.slabs(sizes.width):
                before = wide_y[i, pl.ds(TILE - 1, sizes.group), slab]
                wide_da[i, steps, slab] = wide_g[i, steps, slab] * before
        return states

    linear_scan.for_each_group(group, block, d_last, dh, length, sizes, reverse=True)

    for g, at in _parts(r_kernel, sizes):
        i, _, channels = at
        kind = _kind(kinds, at)
        values = _inside(x[at], kind, length, sizes)
        r, gate, a, u = wide_r[at], wide_i[at], wide_a[at], wide_u[at]
        gated = gate * values.astype(jnp.float32)
        inverse = rg_lru.inverse_root(u)
        # d sqrt(1 - a^2) / d log a = -a^2 / sqrt(1 - a^2), bounded.
        slope = a * jnp.minimum(inverse, SMALLEST_RADICAND**-0.5)
        d_log_a = a * (wide_da[at] - wide_g[at] * gated * slope)
        # Where a document starts or the state is held, the gates do not matter.
        d_log_a = jnp.where(kind == STEP, d_log_a * r, 0.0)
        d_gated = wide_g[at] * rg_lru.factor(u * inverse, kind)
        d_gated = jnp.where(kind == HOLD, 0.0, d_gated)
        d_r = d_log_a * log_decays[i, :, channels] * (1.0 - r)
        d_i = d_gated * gated * (1.0 - gate)
        for n, term in enumerate((d_log_a, d_r, d_i)):
            totals[n, i, :, channels] += _sum_of_tiles(term)
        d_r, d_i = d_r.astype(x.dtype), d_i.astype(x.dtype)
        d_values = d_gated * gate + _dot(d_r, r_kernel[g], 1, 1)
        d_values = d_values + _dot(d_i, i_kernel[g], 1, 1)
        dx[at] = d_values.astype(dx.dtype)
        d_r_kernel[i, g] += _dot(values, d_r, 0, 0)
        d_i_kernel[i, g] += _dot(values, d_i, 0, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for i in range(sizes.rows):
            sums = (jnp.sum(totals[n, i], axis=0, keepdims=True) for n in range(3))
            of_decay, d_r_bias[i], d_i_bias[i] = sums
            slope = -DECAY_SCALE * jax.nn.sigmoid(a_param[i].astype(jnp.float32))
            d_a_param[i] = slope * of_decay


def _prepare(kinds, log_decays, positions, a_param, block, length, sizes) -> None:
    """What the sweeps over the gates need of positions and a_param."""
    log_decays[...] = log_decay(a_param[...])
    for i in range(sizes.rows):
        for start in range(0, sizes.steps, sizes.group):
            kinds[i, pl.ds(start, sizes.group), :] = rg_lru.step_kinds(
                positions[i], block, start, length, sizes
            )


def _parts(kernel, sizes: BlockSizes) -> Iterator[tuple[int, tuple]]:
    """Diagonal blocks, and for each its channels of each row: (row, steps, channels)."""
    groups, width, _ = kernel.shape
    for g in range(groups):
        for i in range(sizes.rows):
            yield g, (i, pl.ds(0, sizes.steps), pl.ds(g * width, width))


def _kind(kinds, at) -> jax.Array:
    """HOLD, START or STEP, for each element of a part."""
    i, steps, channels = at
    kind = kinds[i, steps, :]
    return jnp.concatenate([kind] * (channels.size // LANES), axis=1)


def _inside(values, kind, length: int, sizes: BlockSizes) -> jax.Array:
    """Values of a part, without what lies past the end of the sequence."""
    if length % sizes.steps == 0:
        return values
    wide = jnp.where(kind == HOLD, 0.0, values.astype(jnp.float32))
    return wide.astype(values.dtype)


def _gates(values, weights, g: int, log_decays, at):
    """`rg_lru.gates` of a part; logits are rounded as those of `gates.logits` are."""
    r_kernel, r_bias, i_kernel, i_bias = weights
    i, _, channels = at
    r_logits, i_logits = (
        _dot(values, kernel[g], 1, 0) + bias[g].astype(jnp.float32)
        for kernel, bias in ((r_kernel, r_bias), (i_kernel, i_bias))
    )
    r_logits, i_logits = r_logits.astype(values.dtype), i_logits.astype(values.dtype)
    return rg_lru.gates(r_logits, i_logits, log_decays[i, :, channels])


def _dot(left, right, left_axis: int, right_axis: int) -> jax.Array:
    """The product that sums over one axis of each matrix, float32."""
    return linear_scan.dot(left, right, (((left_axis,), (right_axis,)), ((), ())))


def _sum_of_tiles(term: jax.Array) -> jax.Array:
    """[steps, channels] -> [TILE, channels], with the same sum over the first axis."""
    if term.shape[0] % TILE:
        return jnp.pad(jnp.sum(term, 0, keepdims=True), ((0, TILE - 1), (0, 0)))
    return jnp.sum(term.reshape(-1, TILE, term.shape[1]), axis=0)


def _block_sizes(x, kernel, *, gradient: bool) -> BlockSizes:
    width, itemsize = kernel.shape[1], x.dtype.itemsize
    sizes = gate_block_sizes(x.shape, width, itemsize, gradient=gradient)
    assert sizes is not None, f"{kernel.shape} fits no block: see `supports`"
    return sizes


def _weights(x, r_kernel, r_bias, i_kernel, i_bias, sizes):
    """The parameters of the gates as the kernels take them, and their block specs."""
    width = r_kernel.shape[1]
    groups = sizes.width // width
    # Read once for each block of channels: one buffer does.
    kernel = pl.BlockSpec(
        (groups, width, width), lambda c, b, t: (c, 0, 0), pipeline_mode=pl.Buffered(1)
    )
    bias = pl.BlockSpec((groups, 1, width), lambda c, b, t: (c, 0, 0))
    r_kernel, i_kernel = r_kernel.astype(x.dtype), i_kernel.astype(x.dtype)
    arrays = (r_kernel, r_bias[:, None], i_kernel, i_bias[:, None])
    return arrays, (kernel, bias, kernel, bias)


def _prepared_scratch(sizes: BlockSizes) -> list:
    return [
        pltpu.VMEM((sizes.rows, sizes.steps, LANES), jnp.float32),
        pltpu.VMEM((sizes.rows, 1, sizes.width), jnp.float32),
    ]


@partial(jax.jit, static_argnames="interpret")
def recurrence(
    x: jax.Array,
    r_kernel: jax.Array,
    r_bias: jax.Array,
    i_kernel: jax.Array,
    i_bias: jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`; a_param is [B, E] here, one for each row."""
    sizes = _block_sizes(x, r_kernel, gradient=False)
    sequence, state, _ = linear_scan.block_specs(x.shape, sizes, reverse=False)
    position = rg_lru.positions_spec(x.shape, sizes, reverse=False)
    weights, weight_specs = _weights(x, r_kernel, r_bias, i_kernel, i_bias, sizes)
    a_param, positions, h0 = map(linear_scan.as_rows, (a_param, positions, h0))
    arguments = (x, *weights, a_param, positions, h0)
    whole = pltpu.VMEM((sizes.rows, sizes.steps, sizes.width), jnp.float32)
    flops = (20 + 4 * r_kernel.shape[1]) * x.size
    y, h_last = pl.pallas_call(
        partial(_kernel, length=x.shape[1], sizes=sizes),
        name="rg_lru_with_gates",
        grid=linear_scan.grid(x.shape, sizes),
        in_specs=[sequence, *weight_specs, state, position, state],
        out_specs=[sequence, state],
        out_shape=[linear_scan.like(x), linear_scan.like(h0)],
        scratch_shapes=[
            *_prepared_scratch(sizes),
            *[whole] * 2,
            linear_scan.group_scratch(sizes),
        ],
        compiler_params=linear_scan.COMPILER_PARAMS,
        cost_estimate=linear_scan.cost(flops, 6 * x.size, x, *arguments, h0),
        interpret=interpret,
    )(*arguments)
    return y, h_last[:, 0]


@partial(jax.jit, static_argnames="interpret")
def gradients(
    x: jax.Array,
    r_kernel: jax.Array,
    r_bias: jax.Array,
    i_kernel: jax.Array,
    i_bias: jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Gradients of all but positions; of the gates' parameters, for each row."""
    sizes = _block_sizes(x, r_kernel, gradient=True)
    sequence, state, before = linear_scan.block_specs(x.shape, sizes, reverse=True)
    position = rg_lru.positions_spec(x.shape, sizes, reverse=True)
    weights, weight_specs = _weights(x, r_kernel, r_bias, i_kernel, i_bias, sizes)
    states = map(linear_scan.as_rows, (a_param, positions, h0, last_gradient))
    a_param, positions, h0, last_gradient = states
    arguments = (
        y_gradient, x, *weights, a_param, positions, y, y, h0, last_gradient
    )  # fmt: skip
    groups, width, _ = r_kernel.shape
    kernel = pl.BlockSpec(
        (sizes.rows, sizes.width // width, width, width),
        lambda c, b, t: (b, c, 0, 0),
        pipeline_mode=pl.Buffered(1),  # Written once for each row and channel.
    )
    per_row = jax.ShapeDtypeStruct((x.shape[0], groups, width, width), jnp.float32)
    state_shape = linear_scan.like(h0)
    whole = pltpu.VMEM((sizes.rows, sizes.steps, sizes.width), jnp.float32)
    flops = (50 + 12 * width) * x.size
    dx, dr_kernel, dr_bias, di_kernel, di_bias, d_a_param, dh0 = pl.pallas_call(
        partial(_gradient_kernel, length=x.shape[1], sizes=sizes),
        name="rg_lru_with_gates_gradient",
        grid=linear_scan.grid(x.shape, sizes),
        in_specs=[
            *[sequence] * 2, *weight_specs, state, position, sequence, before, state,
            state,
        ],
        out_specs=[sequence, kernel, state, kernel, state, state, state],
        out_shape=[
            linear_scan.like(x), per_row, state_shape, per_row, *[state_shape] * 3
        ],
        scratch_shapes=[
            *_prepared_scratch(sizes),
            *[whole] * 6,
            linear_scan.group_scratch(sizes),
            linear_scan.group_scratch(sizes, TILE),
            pltpu.VMEM((sizes.rows, TILE, sizes.width), jnp.float32),
            pltpu.VMEM((3, sizes.rows, TILE, sizes.width), jnp.float32),
        ],
        compiler_params=linear_scan.COMPILER_PARAMS,
        cost_estimate=linear_scan.cost(flops, 6 * x.size, *arguments[:9], x),
        interpret=interpret,
    )(*arguments)  # fmt: skip
    bias_shape = (x.shape[0], *r_bias.shape)
    dr_bias, di_bias = (bias.reshape(bias_shape) for bias in (dr_bias, di_bias))
    return dx, dr_kernel, dr_bias, di_kernel, di_bias, d_a_param[:, 0], dh0[:, 0]
