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

from recurrentgemma.kernels.linear_scan import tpu_programs as tpu
from recurrentgemma.kernels.linear_scan.block_sizes import (
    LANES,
    TILE,
    Blocks,
    gate_block_sizes,
)
from recurrentgemma.kernels.rg_lru import pallas_tpu as without_products
from recurrentgemma.kernels.rg_lru.gates import Gate, Inputs
from recurrentgemma.kernels.rg_lru.reference import log_decay, scan_decay
from recurrentgemma.kernels.rg_lru.steps import (
    Gates,
    a_param_gradient,
    scan_input,
    step_gradients,
)
from recurrentgemma.kernels.tpu_chips import chip_of


def _kernel(
    x, r_kernel, r_bias, i_kernel, i_bias, a_param, positions, h0, y, h,
    signs, log_decays, wide_a, wide_x, wide_y, *, blocks,
):  # fmt: skip
    _prepare(signs, log_decays, positions, a_param, blocks)
    weights = (r_kernel, r_bias, i_kernel, i_bias)
    for g, at in _parts(r_kernel, blocks):
        sign = _sign(signs, at)
        values = _inside(x[at], sign, blocks)
        gates = _gates(values, weights, g, log_decays, at)
        wide_a[at] = scan_decay(gates.a, sign)
        wide_x[at] = scan_input(values.astype(jnp.float32), gates, sign)

    def group(start, first, states):
        now = (slice(None), pl.ds(start, blocks.group))
        tpu.scan_steps(wide_x.at[now], wide_a.at[now], y.at[now], wide_y, states)

    tpu.for_each_group(group, h0, h, blocks)


def _gradient_kernel(
    dy, x, r_kernel, r_bias, i_kernel, i_bias, a_param, positions, y, y_before, h0,
    d_last, dx, d_r_kernel, d_r_bias, d_i_kernel, d_i_bias, d_a_param, dh,
    signs, log_decays, wide_r, wide_i, wide_a, wide_u, wide_g, wide_before,
    wide_dy, wide_y, edge, totals, *, blocks,
):  # fmt: skip
    tpu.prepare_edge(edge, y_before, h0, blocks)
    _prepare(signs, log_decays, positions, a_param, blocks)
    weights = (r_kernel, r_bias, i_kernel, i_bias)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in (totals, d_r_kernel, d_i_kernel):
            ref[...] = jnp.zeros_like(ref)

    for g, at in _parts(r_kernel, blocks):
        sign = _sign(signs, at)
        values = _inside(x[at], sign, blocks)
        wide_r[at], wide_i[at], a, wide_u[at] = _gates(
            values, weights, g, log_decays, at
        )
        wide_a[at] = scan_decay(a, sign)

    def group(start, first, states):
        steps = pl.ds(start, blocks.group)
        now = (slice(None), steps)
        inside = tpu.inside_sequence(first, blocks)
        upstream = tpu.widened(dy.at[now], wide_dy, inside, 0.0)
        tpu.load_states(wide_y, y, edge, start, blocks)
        tpu.adjoint_steps(upstream, wide_a.at[now], wide_g.at[now], states)
        for i, _, slab in tpu.tiles(blocks.rows, blocks.width):
            before = wide_y[i, pl.ds(TILE - 1, blocks.group), slab]
            wide_before[i, steps, slab] = before

    tpu.for_each_group(group, d_last, dh, blocks)

    for g, at in _parts(r_kernel, blocks):
        i, _, channels = at
        sign = _sign(signs, at)
        values = _inside(x[at], sign, blocks)
        of_x, of_r, of_i, of_log_decay = step_gradients(
            wide_g[at],
            wide_before[at],
            values.astype(jnp.float32),
            Gates(wide_r[at], wide_i[at], wide_a[at], wide_u[at]),
            log_decays[i, :, channels],
            sign,
        )
        for n, term in enumerate((of_log_decay, of_r, of_i)):
            totals[n, i, :, channels] += _sum_of_tiles(term)
        of_r, of_i = of_r.astype(x.dtype), of_i.astype(x.dtype)
        for of_logits, kernel in ((of_r, r_kernel), (of_i, i_kernel)):
            of_x = of_x + tpu.dot(of_logits, kernel[g], 1, 1)
        dx[at] = of_x.astype(dx.dtype)
        d_r_kernel[i, g] += tpu.dot(values, of_r, 0, 0)
        d_i_kernel[i, g] += tpu.dot(values, of_i, 0, 0)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for i in range(blocks.rows):
            sums = (jnp.sum(totals[n, i], axis=0, keepdims=True) for n in range(3))
            of_log_decay, d_r_bias[i], d_i_bias[i] = sums
            d_a_param[i] = a_param_gradient(a_param[i], of_log_decay)


def _prepare(signs, log_decays, positions, a_param, blocks) -> None:
    """What the sweeps over the gates need of positions and a_param."""
    log_decays[...] = log_decay(a_param[...])
    first = tpu.time_block(blocks) * blocks.steps
    for i in range(blocks.rows):
        for start in range(0, blocks.steps, blocks.group):
            found = without_products.signs_of(positions[i], first + start, blocks)
            signs[i, pl.ds(start, blocks.group), :] = found


def _parts(kernel, blocks: Blocks) -> Iterator[tuple[int, tuple]]:
    """Diagonal blocks, and for each its channels of each row: (row, steps, channels)."""
    groups, width, _ = kernel.shape
    for g in range(groups):
        for i in range(blocks.rows):
            yield g, (i, pl.ds(0, blocks.steps), pl.ds(g * width, width))


def _sign(signs, at) -> jax.Array:
    """Sign of the position, for each element of a part."""
    i, steps, channels = at
    sign = signs[i, steps, :]
    return jnp.concatenate([sign] * (channels.size // LANES), axis=1)


def _inside(values, sign, blocks: Blocks) -> jax.Array:
    """Values of a part, without what lies past the end of the sequence."""
    if blocks.length % blocks.steps == 0:
        return values
    wide = jnp.where(sign < 0, 0.0, values.astype(jnp.float32))
    return wide.astype(values.dtype)


def _gates(values, weights, g: int, log_decays, at) -> Gates:
    """The gates of a part; logits are rounded as those of `gates.logits` are."""
    r_kernel, r_bias, i_kernel, i_bias = weights
    i, _, channels = at
    r_logits, i_logits = (
        tpu.dot(values, kernel[g], 1, 0) + bias[g].astype(jnp.float32)
        for kernel, bias in ((r_kernel, r_bias), (i_kernel, i_bias))
    )
    r_logits, i_logits = r_logits.astype(values.dtype), i_logits.astype(values.dtype)
    return without_products.gates(r_logits, i_logits, log_decays[i, :, channels])


def _sum_of_tiles(term: jax.Array) -> jax.Array:
    """[steps, channels] -> [TILE, channels], with the same sum over the first axis."""
    if term.shape[0] % TILE:
        return jnp.pad(jnp.sum(term, 0, keepdims=True), ((0, TILE - 1), (0, 0)))
    return jnp.sum(term.reshape(-1, TILE, term.shape[1]), axis=0)


def _plan(inputs: Inputs, *, gradient: bool) -> tuple[Blocks, list[tpu.Blocked], list]:
    """Blocks, the parameters of the gates, and the scratch of both kernels."""
    x, gates = inputs.x, (inputs.recurrence_gate, inputs.input_gate)
    width = gates[0].kernel.shape[1]
    sizes = (x.shape, width, x.dtype.itemsize)
    blocks = gate_block_sizes(*sizes, gradient=gradient, chip=chip_of(x))
    assert blocks is not None, f"{gates[0].kernel.shape} fits no block: see `supports`"
    groups = blocks.width // width
    # Read once for each block of channels: one buffer does.
    kernel = pl.BlockSpec(
        (groups, width, width), lambda c, b, t: (c, 0, 0), pipeline_mode=pl.Buffered(1)
    )
    bias = pl.BlockSpec((groups, 1, width), lambda c, b, t: (c, 0, 0))
    parameters = []
    for gate in gates:
        parameters.append(tpu.Blocked(gate.kernel.astype(x.dtype), kernel))
        parameters.append(tpu.Blocked(gate.bias[:, None], bias))
    signs = pltpu.VMEM((blocks.rows, blocks.steps, LANES), jnp.float32)
    return blocks, parameters, [signs, 1]


@partial(jax.jit, static_argnames="interpret")
def recurrence(
    inputs: Inputs, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`."""
    if not isinstance(inputs.recurrence_gate, Gate):
        return without_products.recurrence(inputs, interpret=interpret)
    x, gate, _, a_param, positions, h0 = inputs
    blocks, parameters, scratch = _plan(inputs, gradient=False)
    y, h_last = tpu.call(
        _kernel,
        "rg_lru_with_gates",
        (x, *parameters, a_param, tpu.PerStep(positions), h0),
        (x, h0),
        blocks,
        [*scratch, blocks.steps, blocks.steps, blocks.group],
        operations=(20 + 4 * gate.kernel.shape[1], 6),
        interpret=interpret,
    )
    return y, h_last


@partial(jax.jit, static_argnames="interpret")
def gradients(
    arguments: tuple[Inputs],
    results: tuple[jax.Array, Any],
    upstream: tuple[jax.Array, jax.Array],
    *,
    interpret: Any = False,
) -> tuple[Inputs]:
    """See `Implementation.gradient`."""
    (inputs,) = arguments
    if not isinstance(inputs.recurrence_gate, Gate):
        return without_products.gradients(
            arguments, results, upstream, interpret=interpret
        )
    x, *gates, a_param, positions, h0 = inputs
    (y, _), (y_gradient, last_gradient) = results, upstream
    blocks, parameters, scratch = _plan(inputs, gradient=True)
    groups, width, _ = gates[0].kernel.shape
    of_kernel = tpu.Blocked(
        jax.ShapeDtypeStruct((x.shape[0], groups, width, width), jnp.float32),
        pl.BlockSpec(
            (blocks.rows, blocks.width // width, width, width),
            lambda c, b, t: (b, c, 0, 0),
            pipeline_mode=pl.Buffered(1),  # Written once for each row and channel.
        ),
    )
    of_x, *of_parameters, of_h0 = tpu.call(
        _gradient_kernel,
        "rg_lru_with_gates_gradient",
        (
            *(y_gradient, x, *parameters, a_param, tpu.PerStep(positions)),
            *(y, tpu.Before(y), h0, last_gradient),
        ),
        (x, of_kernel, h0, of_kernel, h0, h0, h0),
        blocks,
        [
            *scratch,
            *[blocks.steps] * 6,
            *(blocks.group, TILE + blocks.group, TILE),
            pltpu.VMEM((3, blocks.rows, TILE, blocks.width), jnp.float32),
        ],
        operations=(50 + 12 * width, 6),
        interpret=interpret,
    )
    # The kernel's are for each row.
    *of_gates, of_a_param = (
        jnp.sum(found, axis=0).reshape(parameter.shape).astype(parameter.dtype)
        for found, parameter in zip(
            of_parameters, (*gates[0], *gates[1], a_param), strict=True
        )
    )
    return (
        Inputs(of_x, Gate(*of_gates[:2]), Gate(*of_gates[2:]), of_a_param, None, of_h0),
    )
