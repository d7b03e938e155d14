"""The decode step as a Pallas kernel for TPU: matrices are read once, states in place.

The grid is (groups of gate blocks, groups of rows), rows innermost: a matrix stays in
on-chip memory for all rows. A step of the grid convolves its rows, multiplies them with
the matrices of both gates, and does the recurrence. Its values pass in tiles, so that
they fit in the registers.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from recurrentgemma.kernels.dispatch import takes
from recurrentgemma.kernels.linear_scan.block_sizes import LANES
from recurrentgemma.kernels.linear_scan.tpu_programs import cost, dot
from recurrentgemma.kernels.recurrent_step.reference import StepParameters
from recurrentgemma.kernels.rg_lru.pallas_tpu import gates
from recurrentgemma.kernels.rg_lru.reference import log_decay, scan_decay
from recurrentgemma.kernels.rg_lru.steps import scan_input

MAX_ROWS = 64
"""Rows of a step of the grid."""
TILE_ROWS = 32
"""Rows that pass through the registers at a time: as many as fit."""
MATRIX_BYTES = 2**20
"""Matrices of a step of the grid, at most, unless those of one block are larger."""
MAX_MATRIX_BYTES = 2**22
"""Those of one block, at most: two of them lie in on-chip memory."""
_DTYPES = takes(jnp.float32, jnp.bfloat16)


def _kernel(
    x, conv_state, positions, h, conv_kernel, conv_bias, recurrence_kernel,
    recurrence_bias, input_kernel, input_bias, a_param, y, new_h, new_conv_state,
    convolved, recurrence_logits, input_logits, log_decays, wide_positions,
):  # fmt: skip
    rows, reach = x.shape[0], conv_kernel.shape[0] - 1
    height = min(rows, TILE_ROWS)
    blocks, block, _ = recurrence_kernel.shape
    first_block = pl.program_id(0) * blocks

    def for_each_tile(tile, first_channel):
        """Runs it on rows, on channels of the block, and on these of the arrays."""

        def body(i, _):
            start = pl.multiple_of(i * height, height)
            for c in range(0, block, LANES):
                channels = pl.multiple_of(first_channel + c, LANES)
                tile(pl.ds(start, height), pl.ds(c, LANES), pl.ds(channels, LANES))
            return ()

        jax.lax.fori_loop(0, rows // height, body, ())

    def tap(k, tile, slab):
        return (pl.ds(k, 1), slab) if rows == 1 else (k, tile, slab)

    def convolve(tile, here, slab):
        inputs = [conv_state[tap(k, tile, slab)] for k in range(reach)]
        total, moved = _convolution(
            [array.astype(jnp.float32) for array in (*inputs, x[tile, slab])],
            wide_positions[tile, :],
            conv_kernel[:, slab].astype(jnp.float32),
            conv_bias[:, slab].astype(jnp.float32),
        )
        convolved[tile, here] = _rounded(total, x.dtype)
        for k, state in enumerate(moved):
            new_conv_state[tap(k, tile, slab)] = state.astype(new_conv_state.dtype)

    def recur(tile, here, slab):
        at = (tile, here)
        found = gates(recurrence_logits[at], input_logits[at], log_decays[:, slab])
        position = wide_positions[tile, :]
        state = scan_decay(found.a, position) * h[tile, slab]
        state = state + scan_input(convolved[at], found, position)
        new_h[tile, slab] = state
        y[tile, slab] = state.astype(y.dtype)

    wide_positions[...] = jnp.broadcast_to(positions[...], wide_positions.shape)
    log_decays[...] = log_decay(a_param[...])

    def gate_block(i):
        for_each_tile(convolve, i * block)
        inputs = convolved[...].astype(x.dtype)
        row = first_block + i
        for matrices, biases, logits in (
            (recurrence_kernel, recurrence_bias, recurrence_logits),
            (input_kernel, input_bias, input_logits),
        ):
            matrix = matrices[i].astype(inputs.dtype)
            product = dot(inputs, matrix, 1, 0)
            logits[...] = _rounded(product + _row(biases, row), x.dtype)
        for_each_tile(recur, i * block)

    # One block's products overlap with the other's arithmetic; more would spill.
    at_once = 2 - blocks % 2

    def gate_blocks(i, _):
        for j in range(at_once):
            gate_block(i * at_once + j)
        return ()

    jax.lax.fori_loop(0, blocks // at_once, gate_blocks, ())


def _convolution(inputs, position, kernel, bias):
    """Of the inputs of a tile, oldest first; and the inputs that the next step sees."""
    reach = len(inputs) - 1
    total = inputs[reach] * kernel[reach:] + bias
    moved = []
    for back in range(1, reach + 1):
        k = reach - back
        tap = inputs[k] * kernel[k : k + 1]
        total = total + jnp.where(position >= back, tap, 0.0)
        shifted = jnp.where(position >= back - 1, inputs[k + 1], 0.0)
        moved.insert(0, jnp.where(position < 0, inputs[k], shifted))
    return total, moved


def _rounded(x: jax.Array, dtype) -> jax.Array:
    """float32, with the digits of another dtype."""
    return x.astype(dtype).astype(jnp.float32)


def _row(array, index: jax.Array) -> jax.Array:
    """A row [1, width] in float32; loads at an index like this are of whole tiles."""
    here = jax.lax.broadcasted_iota(jnp.int32, array.shape, 0) == index
    wide = array[...].astype(jnp.float32)
    return jnp.sum(jnp.where(here, wide, 0.0), axis=0, keepdims=True)


@partial(jax.jit, static_argnames="interpret")
def step(
    x: jax.Array,
    parameters: StepParameters,
    positions: jax.Array,
    h: jax.Array,
    conv_state: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `recurrent_step`."""
    conv_kernel, conv_bias, *gates, a_param = parameters
    batch = len(x)
    blocks, block, _ = gates[0].kernel.shape
    rows = batch if batch <= TILE_ROWS else MAX_ROWS
    together = blocks_together(gates[0].kernel)
    channels = together * block

    def of_channels(height: int):
        return pl.BlockSpec((height, channels), lambda c, b: (0, c))

    # The layouts that arrays of these shapes have on TPU: others would be copies.
    if batch == 1:
        state = conv_state[0]
        state_spec = of_channels(len(state))
    else:
        state = jnp.swapaxes(conv_state, 0, 1)
        state_spec = pl.BlockSpec((len(state), rows, channels), lambda c, b: (0, b, c))
    of_rows = pl.BlockSpec((rows, channels), lambda c, b: (b, c))

    matrix = pl.BlockSpec((together, block, block), lambda c, b: (c, 0, 0))
    biases = pl.BlockSpec((blocks, block), lambda c, b: (0, 0))
    position = pl.BlockSpec((rows, 1), lambda c, b: (b, 0))
    taps = conv_kernel.shape[0]
    arguments = (
        x, state, positions[:, None], h, conv_kernel, conv_bias[None],
        *gates[0], *gates[1], a_param[None],
    )  # fmt: skip
    y, h, state = pl.pallas_call(
        _kernel,
        name="recurrent_step",
        grid=(blocks // together, pl.cdiv(batch, rows)),
        in_specs=[
            *(of_rows, state_spec, position, of_rows, of_channels(taps)),
            *(of_channels(1), matrix, biases, matrix, biases, of_channels(1)),
        ],
        out_specs=[of_rows, of_rows, state_spec],
        out_shape=[
            jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, h, state)
        ],
        input_output_aliases={1: 2, 3: 1},
        scratch_shapes=[
            *[pltpu.VMEM((rows, block), jnp.float32)] * 3,
            pltpu.VMEM((1, channels), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        cost_estimate=cost(x.size, 4 * block + 20, 6, *arguments, x, h, state),
        interpret=interpret,
    )(*arguments)
    return y, h, state[None] if batch == 1 else jnp.swapaxes(state, 0, 1)


def blocks_together(matrices: jax.Array) -> int:
    """How many gate blocks a step of the grid takes: a divisor of their number."""
    blocks = len(matrices)
    fitting = max(MATRIX_BYTES // _bytes_of_a_block(matrices), 1)
    return max(n for n in range(1, blocks + 1) if blocks % n == 0 and n <= fitting)


def supports(
    x: jax.Array,
    parameters: StepParameters,
    positions: jax.Array,
    h: jax.Array,
    conv_state: jax.Array,
) -> str | None:
    """Why a shape does not fit, or None."""
    matrices = parameters.recurrence_gate.kernel
    block = matrices.shape[1]
    if block % LANES:
        return f"it takes gate blocks of a multiple of {LANES} channels, not {block}"
    if _bytes_of_a_block(matrices) > MAX_MATRIX_BYTES:
        return f"a gate block of {block} channels does not fit in on-chip memory"
    if conv_state.shape[1] == 0:
        return "it takes a convolution of at least two taps"
    return _DTYPES(x, parameters, positions, h, conv_state)


def _bytes_of_a_block(matrices: jax.Array) -> int:
    """Of both gates."""
    return 2 * matrices.shape[1] ** 2 * matrices.dtype.itemsize
