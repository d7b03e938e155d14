"""The linear scan as Pallas kernels for GPU, through Triton.

A program takes CHANNELS neighbouring channels of one row, a thread for each, through
time: UNROLL steps are loaded at once, so that their latencies overlap, then computed and
stored. Where rows and channels are too few to fill the chip, time is cut into chunks
that run side by side, in two passes over the inputs:

    1. each chunk's product of decays and its last state when started from zero;
    2. each chunk's first state, from the summaries of the chunks before it; its states.

Arrays keep the layout [B, T, D] that they have; the carry is float32. The gradient is
the same two passes in the other direction, with c_T the gradient of h_last:

    g_t = dy_t + c_{t+1}     c_t = a_t g_t
    grad_x_t = g_t           grad_a_t = g_t y_{t-1}           grad_h0 = c_0

All that is particular to the Triton back end is `_call`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

CHANNELS = 32
"""Of a program: the threads of a warp."""
UNROLL = 32
"""Steps whose inputs are in flight together."""
PROGRAMS = 512
"""Enough to fill a chip: four warps, and 32 KB in flight, for each of 128 processors."""
SHORTEST_CHUNK = 128
"""Steps below which a chunk is not worth its summary."""
INTERPRETED_UNROLL, INTERPRETED_PROGRAMS = 4, 8
"""Interpreted, long code takes long to compile and programs run one after another."""
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Sizes(NamedTuple):
    """How time is cut up.

    Attributes:
      length: T.
      chunk: steps of a chunk; the last one may have fewer.
      chunks: how many there are.
      unroll: steps handled together.
    """

    length: int
    chunk: int
    chunks: int
    unroll: int


def supports(*arrays: jax.Array, **_: Any) -> str | None:
    """Why the kernels cannot take these arguments, or None."""
    for array in arrays:
        if array.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, not {array.dtype}"
    return None


def _summary_kernel(x, a, product, end, *, sizes, reverse, adjoint):
    def step(carry, inputs):
        decay, h = carry
        x_t, a_t = inputs
        h = a_t * (x_t + h) if adjoint else a_t * h + x_t
        return (a_t * decay, h), ()

    zeros = jnp.zeros([CHANNELS], jnp.float32)
    product[...], end[...] = _for_each_step(
        step, (zeros + 1, zeros), [_load(x), _load(a)], [], sizes, reverse
    )


def _scan_kernel(x, a, h0, products, ends, y, h_last, *, sizes, reverse):
    def step(h, inputs):
        x_t, a_t = inputs
        h = a_t * h + x_t
        return h, (h,)

    h = _first_state(h0, products, ends, sizes, reverse)
    h = _for_each_step(step, h, [_load(x), _load(a)], [y], sizes, reverse)
    _store_last(h_last, h, sizes, reverse)


def _gradient_kernel(
    dy, a, y, y_before, h0, d_last, products, ends, dx, da, dh, *, sizes
):
    starts = pl.program_id(2) == 0
    edge = jnp.where(starts, h0[...], y_before[...].astype(jnp.float32))

    def load_before(row):
        earlier = y[jnp.maximum(row - 1, 0), :].astype(jnp.float32)
        return jnp.where(row == 0, edge, earlier)

    def step(c, inputs):
        dy_t, a_t, before = inputs
        g = dy_t + c
        return a_t * g, (g, g * before)

    c = _first_state(d_last, products, ends, sizes, reverse=True)
    inputs = [_load(dy), _load(a), load_before]
    c = _for_each_step(step, c, inputs, [dx, da], sizes, reverse=True)
    _store_last(dh, c, sizes, reverse=True)


@partial(jax.jit, static_argnames=("reverse", "interpret"))
def scan(
    x: jax.Array,
    a: jax.Array,
    h0: jax.Array,
    reverse: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""
    width = x.shape[2]
    x, a, h0 = (_pad_channels(array) for array in (x, a, h0))
    sizes = choose_sizes(x.shape, interpret)
    y, h_last = _call(
        partial(_scan_kernel, sizes=sizes, reverse=reverse),
        "linear_scan",
        (x, a, h0, *_summaries(x, a, sizes, reverse, False, interpret)),
        (x, h0),
        sizes,
        interpret,
    )
    return y[..., :width], h_last[..., :width]


@partial(jax.jit, static_argnames="interpret")
def gradients(
    a: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, a and h0, from the result y and the gradients of y and h_last."""
    width = a.shape[2]
    dy, a, y, h0, d_last = (
        _pad_channels(array) for array in (y_gradient, a, y, h0, last_gradient)
    )
    sizes = choose_sizes(a.shape, interpret)
    summaries = _summaries(dy, a, sizes, True, True, interpret)
    results = _call(
        partial(_gradient_kernel, sizes=sizes),
        "linear_scan_gradient",
        (dy, a, y, _Before(y), h0, d_last, *summaries),
        (dy, a, d_last),
        sizes,
        interpret,
    )
    dx, da, dh = (array[..., :width] for array in results)
    return dx, da, dh


def choose_sizes(shape: tuple[int, ...], interpret: bool = False) -> Sizes:
    """How to cut up arrays of this shape, [B, T, D], with D in whole blocks."""
    batch, length, width = shape
    unroll, programs = UNROLL, PROGRAMS
    if interpret:
        unroll, programs = INTERPRETED_UNROLL, INTERPRETED_PROGRAMS
    chunks = -(-programs // (batch * (width // CHANNELS)))
    chunks = min(chunks, max(length // SHORTEST_CHUNK, 1))
    chunk = min(-(-length // (chunks * unroll)) * unroll, length)
    return Sizes(length, chunk, -(-length // chunk), unroll)


def _summaries(x, a, sizes, reverse, adjoint, interpret):
    """Of each chunk, the product of its decays and its last state from zero."""
    state = jax.ShapeDtypeStruct((x.shape[0], sizes.chunks, x.shape[2]), jnp.float32)
    if sizes.chunks == 1:
        return (jnp.zeros(state.shape, state.dtype),) * 2
    return _call(
        partial(_summary_kernel, sizes=sizes, reverse=reverse, adjoint=adjoint),
        "linear_scan_summary",
        (x, a),
        (state, state),
        sizes,
        interpret,
    )


def _load(ref) -> Callable[[Any], jax.Array]:
    """Loads a step of a ref [steps, CHANNELS]."""
    return lambda row: ref[row, :].astype(jnp.float32)


def _for_each_step(
    step: Callable[[Any, tuple], tuple[Any, tuple]],
    carry: Any,
    inputs: list[Callable[[Any], jax.Array]],
    outputs: list,
    sizes: Sizes,
    reverse: bool,
) -> Any:
    """Runs `step(carry, inputs_t) -> carry, outputs_t` over the chunk of this program.

    Some steps at a time, and what is left at the end of the chunk one by one.
    """
    count = jnp.minimum(sizes.chunk, sizes.length - pl.program_id(2) * sizes.chunk)

    def run(start, steps, carry):
        """The steps from the `start`-th on, in the order of time's direction."""
        rows = [start + i for i in range(steps)]
        rows = [count - 1 - row if reverse else row for row in rows]
        loaded = [tuple(load(row) for load in inputs) for row in rows]
        for row, values in zip(rows, loaded, strict=True):
            carry, results = step(carry, values)
            for ref, result in zip(outputs, results, strict=True):
                ref[row, :] = result.astype(ref.dtype)
        return carry

    def group(i, carry):
        return run(i * sizes.unroll, sizes.unroll, carry)

    groups = count // sizes.unroll
    carry = jax.lax.fori_loop(0, groups, group, carry)
    return jax.lax.fori_loop(
        groups * sizes.unroll, count, lambda i, carry: run(i, 1, carry), carry
    )


def _first_state(h0, products, ends, sizes, reverse):
    """The state before this program's chunk."""
    chunk = pl.program_id(2)

    def carry_over(i, h):
        index = sizes.chunks - 1 - i if reverse else i
        return products[index, :] * h + ends[index, :]

    earlier = sizes.chunks - 1 - chunk if reverse else chunk
    return jax.lax.fori_loop(0, earlier, carry_over, h0[...])


def _store_last(ref, state, sizes, reverse):
    @pl.when(pl.program_id(2) == (0 if reverse else sizes.chunks - 1))
    def _():
        ref[...] = state


def _pad_channels(array):
    more = -array.shape[-1] % CHANNELS
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)]) if more else array


class _Before(NamedTuple):
    """An array [B, T, D] of which a program sees the step before its chunk."""

    array: jax.Array


def _call(kernel, name, arrays, results, sizes, interpret):
    """Runs a kernel for every block of channels, row and chunk.

    It gets refs [chunk, CHANNELS] of sequences [B, T, D], [CHANNELS] of states [B, D];
    of summaries [B, chunks, D] it reads all, [chunks, CHANNELS], and writes its own,
    [CHANNELS].
    """
    batch, length, width = arrays[0].shape
    chunk = sizes.chunk

    def spec(array, output):
        if isinstance(array, _Before):
            block = (None, None, CHANNELS)
            return pl.BlockSpec(
                block, lambda d, b, c: (b, jnp.maximum(c * chunk - 1, 0), d)
            )
        if len(array.shape) == 2:
            return pl.BlockSpec((None, CHANNELS), lambda d, b, c: (b, d))
        if array.shape[1] == length:
            return pl.BlockSpec((None, chunk, CHANNELS), lambda d, b, c: (b, c, d))
        if output:
            return pl.BlockSpec((None, None, CHANNELS), lambda d, b, c: (b, c, d))
        return pl.BlockSpec((None, sizes.chunks, CHANNELS), lambda d, b, c: (b, 0, d))

    return pl.pallas_call(
        kernel,
        name=name,
        grid=(width // CHANNELS, batch, sizes.chunks),
        in_specs=[spec(array, False) for array in arrays],
        out_specs=[spec(result, True) for result in results],
        out_shape=[jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results],
        compiler_params=triton.CompilerParams(num_warps=1),
        interpret=interpret,
    )(*(a.array if isinstance(a, _Before) else a for a in arrays))
