"""The linear scan as a Pallas kernel for TPU: each array is read or written once.

The gradient is one pass in the other direction, with c_T the gradient of h_last:
    g_t = dy_t + c_{t+1}     c_t = a_t g_t
    grad_x_t = g_t           grad_a_t = g_t y_{t-1}           grad_h0 = c_0
"""

from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl

from recurrentgemma.kernels.linear_scan import tpu_programs as tpu
from recurrentgemma.kernels.linear_scan.block_sizes import TILE, block_sizes
from recurrentgemma.kernels.tpu_chips import chip_of


def _scan_kernel(x, a, h0, y, h, wide_x, wide_a, wide_y, *, blocks):
    def group(start, first, states):
        steps = pl.ds(start, blocks.group)
        inside = tpu.inside_sequence(first, blocks)
        tpu.scan_steps(
            tpu.widened(x.at[:, steps], wide_x, inside, 0.0),
            tpu.widened(a.at[:, steps], wide_a, inside, 1.0),
            y.at[:, steps],
            wide_y,
            states,
            blocks.reverse,
        )

    tpu.for_each_group(group, h0, h, blocks)


def _gradient_kernel(
    dy, a, y, y_before, h0, d_last, dx, da, dh, wide_dy, wide_a, wide_y, wide_dx,
    edge, *, blocks,
):  # fmt: skip
    tpu.prepare_edge(edge, y_before, h0, blocks)

    def group(start, first, states):
        steps = pl.ds(start, blocks.group)
        inside = tpu.inside_sequence(first, blocks)
        gradients = tpu.widened(dy.at[:, steps], wide_dy, inside, 0.0)
        decays = tpu.widened(a.at[:, steps], wide_a, inside, 1.0)
        tpu.load_states(wide_y, y, edge, start, blocks)
        tpu.adjoint_steps(gradients, decays, wide_dx, states)
        for i, _, slab in tpu.tiles(blocks.rows, blocks.width):
            gradient = wide_dx[i, :, slab]
            dx[i, steps, slab] = gradient.astype(dx.dtype)
            before = wide_y[i, pl.ds(TILE - 1, blocks.group), slab]
            da[i, steps, slab] = (gradient * before).astype(da.dtype)

    tpu.for_each_group(group, d_last, dh, blocks)


@partial(jax.jit, static_argnames=("reverse", "interpret"))
def scan(
    x: jax.Array,
    a: jax.Array,
    h0: jax.Array,
    reverse: bool,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""
    itemsizes = [array.dtype.itemsize for array in (x, a, x)]
    blocks = block_sizes(x.shape, itemsizes, reverse=reverse, chip=chip_of(x))
    y, h_last = tpu.call(
        _scan_kernel,
        "linear_scan",
        (x, a, h0),
        (x, h0),
        blocks,
        [blocks.group] * 3,
        operations=(2, 0),
        interpret=interpret,
    )
    return y, h_last


@partial(jax.jit, static_argnames="interpret")
def gradients(
    a: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, a and h0, from the result y and the gradients of y and h_last."""
    itemsizes = [array.dtype.itemsize for array in (a, a, y, y, y)]
    blocks = block_sizes(y.shape, itemsizes, reverse=True, chip=chip_of(y))
    group = blocks.group
    dx, da, dh = tpu.call(
        _gradient_kernel,
        "linear_scan_gradient",
        (y_gradient, a, y, tpu.Before(y), h0, last_gradient),
        (y, a, h0),
        blocks,
        [group, group, TILE + group, group, TILE],
        operations=(3, 0),
        interpret=interpret,
    )
    return dx, da, dh
