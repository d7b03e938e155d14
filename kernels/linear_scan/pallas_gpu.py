"""The linear scan as Pallas kernels for GPU, through Triton or Mosaic.

Where rows and channels fill the chip, one pass over the inputs does. Else time is cut
into chunks that run side by side, in two passes:

    1. each chunk's product of decays and its last state when started from zero;
    2. each chunk's first state, from the summaries of the chunks before it; its states.

Arrays keep the layout [B, T, D] that they have; the carry is float32. The gradient is
the same two passes in the other direction (`pallas_tpu.py` has the equations).

Another op with this recurrence brings a `Read`, which makes x_t and a_t of what it
loads (`rg_lru/pallas_gpu.py`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.linear_scan import gpu_blocks
from recurrentgemma.kernels.linear_scan import gpu_programs as gpu
from recurrentgemma.kernels.linear_scan.gpu_blocks import GpuBlocks

Read = Callable[..., tuple[list[gpu.Load], Callable[..., tuple[jax.Array, jax.Array]]]]
"""Of a schedule and refs: what to load at a step, and what makes x_t and a_t of that."""


def _read(_, x, a):
    return [gpu.load(x), gpu.load(a)], lambda x_t, a_t: (x_t, a_t)


def _summary_kernel(*refs, read, schedule, adjoint):
    *inputs, product, end = refs
    loads, scan_inputs = read(schedule, *inputs)
    multiply_add = schedule.arithmetic.multiply_add

    def step(carry, inputs):
        decay, h = carry
        x_t, a_t = scan_inputs(*inputs)
        if adjoint:
            return (a_t * decay, a_t * (x_t + h)), ()
        return (a_t * decay, multiply_add(a_t, h, x_t)), ()

    carry = schedule.full(1.0), schedule.full(0.0)
    carry = gpu.for_each_step(step, carry, loads, [], schedule)
    product[...], end[...] = carry


def _scan_kernel(*refs, read, schedule):
    *inputs, h0, products, ends, y, h_last = refs
    loads, scan_inputs = read(schedule, *inputs)

    def step(h, inputs):
        x_t, a_t = scan_inputs(*inputs)
        h = schedule.arithmetic.multiply_add(a_t, h, x_t)
        return h, (h,)

    h = gpu.first_state(h0, products, ends, schedule)
    h = gpu.for_each_step(step, h, loads, [y], schedule)
    gpu.store_last(h_last, h, schedule)


def _gradient_kernel(
    dy, a, y, y_before, h0, d_last, products, ends, dx, da, dh, *, schedule
):
    def step(c, inputs):
        dy_t, a_t, before = inputs
        g = dy_t + c
        return a_t * g, (g, g * before)

    c = gpu.first_state(d_last, products, ends, schedule)
    loads = [gpu.load(dy), gpu.load(a), gpu.load_before(y, y_before, h0)]
    c = gpu.for_each_step(step, c, loads, [dx, da], schedule)
    gpu.store_last(dh, c, schedule)


@partial(jax.jit, static_argnames=("reverse", "interpret", "blocks", "backend"))
def scan(
    x: jax.Array,
    a: jax.Array,
    h0: jax.Array,
    reverse: bool,
    interpret: bool = False,
    blocks: GpuBlocks | None = None,
    backend: str = gpu.TRITON,
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""
    blocks = blocks or gpu_blocks.find("linear_scan", (x, a), interpret)
    schedule = gpu.choose_schedule((x, a), blocks, reverse, interpret, backend)
    return scan_of("linear_scan", _read, (x, a), h0, schedule)


@partial(jax.jit, static_argnames=("interpret", "blocks", "backend"))
def gradients(
    a: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    interpret: bool = False,
    blocks: GpuBlocks | None = None,
    backend: str = gpu.TRITON,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, a and h0, from the result y and the gradients of y and h_last."""
    blocks = blocks or gpu_blocks.find("linear_scan_gradient", (y, a), interpret)
    schedule = gpu.choose_schedule((y, a), blocks, True, interpret, backend)
    arrays = (y_gradient, a)
    dx, da, dh = gpu.call(
        partial(_gradient_kernel, schedule=schedule),
        "linear_scan_gradient",
        (
            *arrays,
            y,
            gpu.Before(y),
            h0,
            last_gradient,
            *summaries("linear_scan_adjoint", _read, arrays, schedule, adjoint=True),
        ),
        (y_gradient, a, h0),
        schedule,
    )
    return dx, da, dh


def scan_of(
    name: str,
    read: Read,
    arrays: Sequence[gpu.Array],
    h0: jax.Array,
    schedule: gpu.Schedule,
) -> tuple[jax.Array, jax.Array]:
    """The states y, like the first array, and the last state of the scan that is read.

    `read` takes refs of the arrays, of which the first is a sequence.
    """
    y, h_last = gpu.call(
        partial(_scan_kernel, read=read, schedule=schedule),
        name,
        (*arrays, h0, *summaries(f"{name}_summary", read, arrays, schedule)),
        (arrays[0], h0),
        schedule,
    )
    return y, h_last


def summaries(
    name: str,
    read: Read,
    arrays: Sequence[gpu.Array],
    schedule: gpu.Schedule,
    adjoint: bool = False,
) -> list[gpu.PerChunk]:
    """Of each chunk, the product of its decays and its last state from zero.

    Both are float32 [B, chunks, D]. In the adjoint scan the state is c of the equations,
    rather than h.
    """
    batch, _, width = gpu.plain(arrays[0]).shape
    state = jax.ShapeDtypeStruct((batch, schedule.chunks, width), jnp.float32)
    if schedule.chunks == 1:
        return [gpu.PerChunk(jnp.zeros(state.shape, state.dtype))] * 2
    kernel = partial(_summary_kernel, read=read, schedule=schedule, adjoint=adjoint)
    results = gpu.call(kernel, name, arrays, [gpu.PerChunk(state)] * 2, schedule)
    return [gpu.PerChunk(result) for result in results]
