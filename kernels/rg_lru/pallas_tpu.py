"""RG-LRU as a Pallas kernel for TPU: gates, decay, input factor and scan in one pass.

A group of steps first passes through the gates, on whole tiles, which leave decays and
scan inputs in scratch; then the scan takes it row by row. What lies past the end of the
sequence is held. Positions come with time along the lanes; a masked sum along the lanes
turns a group of them into a column.

The gradient recomputes the gates from the arguments, takes the states from the result,
and runs in the other direction (`linear_scan/pallas_tpu.py` has the equations).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from recurrentgemma.kernels.linear_scan import tpu_programs as tpu
from recurrentgemma.kernels.linear_scan.block_sizes import (
    LANES,
    TILE,
    Blocks,
    block_sizes,
)
from recurrentgemma.kernels.rg_lru.gates import Inputs, from_logits, with_products
from recurrentgemma.kernels.rg_lru.reference import log_decay, scan_decay
from recurrentgemma.kernels.rg_lru.steps import (
    Gates,
    a_param_gradient,
    scan_input,
    step_gates,
    step_gradients,
)
from recurrentgemma.kernels.tpu_chips import chip_of


def _kernel(
    x, recurrence, input_, a_param, positions, h0, y, h, wide_a, wide_x, wide_y,
    log_decays, *, blocks,
):  # fmt: skip
    log_decays[...] = log_decay(a_param[...])

    def group(start, first, states):
        steps = pl.ds(start, blocks.group)
        signs = [signs_of(positions[i], first, blocks) for i in range(blocks.rows)]
        for here in tpu.tiles(blocks.rows, blocks.width):
            i, _, slab = here
            at, sign = (i, steps, slab), signs[i][:, : slab.stop - slab.start]
            found = gates(recurrence[at], input_[at], log_decays[i, :, slab])
            wide_a[here] = scan_decay(found.a, sign)
            wide_x[here] = scan_input(x[at].astype(jnp.float32), found, sign)
        tpu.scan_steps(wide_x, wide_a, y.at[:, steps], wide_y, states)

    tpu.for_each_group(group, h0, h, blocks)


def _gradient_kernel(
    dy, x, recurrence, input_, a_param, positions, y, y_before, h0, d_last,
    dx, d_recurrence, d_input, d_a_param, dh,
    wide_dy, wide_a, wide_r, wide_i, wide_u, wide_y, wide_g, edge, total,
    log_decays, *, blocks,
):  # fmt: skip
    tpu.prepare_edge(edge, y_before, h0, blocks)
    log_decays[...] = log_decay(a_param[...])

    @pl.when(pl.program_id(2) == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def group(start, first, states):
        steps = pl.ds(start, blocks.group)
        signs = [signs_of(positions[i], first, blocks) for i in range(blocks.rows)]
        inside = tpu.inside_sequence(first, blocks)
        upstream = tpu.widened(dy.at[:, steps], wide_dy, inside, 0.0)
        tpu.load_states(wide_y, y, edge, start, blocks)
        for here in tpu.tiles(blocks.rows, blocks.width):
            i, _, slab = here
            at, sign = (i, steps, slab), signs[i][:, : slab.stop - slab.start]
            wide_r[here], wide_i[here], a, wide_u[here] = gates(
                recurrence[at], input_[at], log_decays[i, :, slab]
            )
            wide_a[here] = scan_decay(a, sign)
        tpu.adjoint_steps(upstream, wide_a, wide_g, states)
        for here in tpu.tiles(blocks.rows, blocks.width):
            i, _, slab = here
            at, sign = (i, steps, slab), signs[i][:, : slab.stop - slab.start]
            of_x, of_r, of_i, of_log_decay = step_gradients(
                wide_g[here],
                wide_y[i, pl.ds(TILE - 1, blocks.group), slab],
                x[at].astype(jnp.float32),
                Gates(wide_r[here], wide_i[here], wide_a[here], wide_u[here]),
                log_decays[i, :, slab],
                sign,
            )
            total[here] += of_log_decay
            dx[at] = of_x.astype(dx.dtype)
            d_recurrence[at] = of_r.astype(d_recurrence.dtype)
            d_input[at] = of_i.astype(d_input.dtype)

    tpu.for_each_group(group, d_last, dh, blocks)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for i in range(blocks.rows):
            of_log_decay = jnp.sum(total[i], axis=0, keepdims=True)
            d_a_param[i] = a_param_gradient(a_param[i], of_log_decay)


def signs_of(positions, first, blocks: Blocks) -> jax.Array:
    """Sign of the position of each step of a group, the same in all channels of a tile.

    Args:
      positions: a row of them [1, lanes], for this block of time among others.
      first: step of the sequence with which the group begins.
      blocks: blocks of the sequences.
    """
    shape = (blocks.group, positions.shape[1])
    step = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    sign = jnp.broadcast_to(jnp.clip(positions.astype(jnp.float32), -1.0, 1.0), shape)
    chosen = lane == jax.lax.rem(first, positions.shape[1]) + step
    column = jnp.sum(jnp.where(chosen, sign, 0.0), axis=1, keepdims=True)
    if blocks.length % blocks.group:
        column = jnp.where(first + step[:, :1] >= blocks.length, -1.0, column)
    return jnp.broadcast_to(column, (blocks.group, min(LANES, blocks.width)))


def gates(recurrence_logits, input_logits, log_decay) -> Gates:
    """The gates in float32; log_decay is log a_t / r_t."""
    logits = recurrence_logits, input_logits
    return step_gates(*logits, log_decay, exp=jnp.exp, reciprocal=_reciprocal)


def _reciprocal(value):
    """Refined by hand: a division has 13 operations."""
    inverse = pl.reciprocal(value, approx=True)
    for _ in range(2):
        inverse = inverse * (2.0 - value * inverse)
    return inverse


def _blocks(*arrays: jax.Array, reverse: bool) -> Blocks:
    """Those of the scan, with blocks of time that fall into one tile of positions."""
    itemsizes = [array.dtype.itemsize for array in arrays]
    x, chip = arrays[0], chip_of(*arrays)
    blocks = block_sizes(x.shape, itemsizes, reverse=reverse, chip=chip)
    return blocks._replace(steps=min(blocks.steps, LANES))


@partial(jax.jit, static_argnames="interpret")
def recurrence(
    inputs: Inputs, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`."""
    *arrays, a_param, positions, h0 = from_logits(inputs)
    x = inputs.x
    blocks = _blocks(*arrays, x, reverse=False)
    y, h_last = tpu.call(
        _kernel,
        "rg_lru",
        (*arrays, a_param, tpu.PerStep(positions), h0),
        (x, h0),
        blocks,
        [*[blocks.group] * 3, 1],
        operations=(20, 6),
        interpret=interpret,
    )
    return y, h_last


@with_products
@partial(jax.jit, static_argnames="interpret")
def gradients(
    arguments: tuple[Inputs],
    results: tuple[jax.Array, Any],
    upstream: tuple[jax.Array, jax.Array],
    *,
    interpret: Any = False,
) -> tuple[Inputs]:
    """See `Implementation.gradient`."""
    [(*arrays, a_param, positions, h0)] = arguments
    y, _ = results
    y_gradient, last_gradient = upstream
    blocks = _blocks(y_gradient, *arrays, y, *arrays, reverse=True)
    group = blocks.group
    *of_sequences, of_a_param, of_h0 = tpu.call(
        _gradient_kernel,
        "rg_lru_gradient",
        (
            *(y_gradient, *arrays, a_param),
            *(tpu.PerStep(positions), y, tpu.Before(y), h0, last_gradient),
        ),
        (*arrays, h0, h0),
        blocks,
        [*[group] * 5, TILE + group, group, TILE, group, 1],
        operations=(50, 6),
        interpret=interpret,
    )
    of_a_param = jnp.sum(of_a_param, axis=0).astype(a_param.dtype)
    return (Inputs(*of_sequences, of_a_param, None, of_h0),)
