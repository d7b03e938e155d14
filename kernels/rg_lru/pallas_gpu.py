"""RG-LRU as Pallas kernels for GPU: gates, decay, input factor and scan in one pass.

Programs, schedule and passes are those of the linear scan's kernels. Its inputs and
decays are made here of the logits as these are loaded: in both passes, since to store
them between the passes would move more bytes. The gradient recomputes the gates from
the arguments, takes the states from the result, and runs in the other direction. That
of a_param gathers in the carry of a program.

An H100 moves the bytes of a bfloat16 element in the time of some seventy instructions,
or of nine exponentials, reciprocals and roots. So both are counted here: an element
takes about forty forward, five of them such functions.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.linear_scan import gpu_blocks
from recurrentgemma.kernels.linear_scan import gpu_programs as gpu
from recurrentgemma.kernels.linear_scan.gpu_blocks import GpuBlocks
from recurrentgemma.kernels.linear_scan.pallas_gpu import scan_of, summaries
from recurrentgemma.kernels.rg_lru.gates import Inputs, from_logits, with_products
from recurrentgemma.kernels.rg_lru.reference import log_decay, scan_decay
from recurrentgemma.kernels.rg_lru.steps import (
    Gates,
    a_param_gradient,
    inverse_gate,
    scan_input,
    step_decay,
    step_gates,
    step_gradients,
)

LOG2_E = math.log2(math.e)


def _read(schedule, x, recurrence, input_, positions, a_param):
    ops = schedule.arithmetic
    decay = log_decay(a_param[...])

    def scan_inputs(x_t, recurrence_t, input_t, position):
        found = _gates(recurrence_t, input_t, decay, ops)
        x_t = scan_input(x_t, found, position, ops.rsqrt)
        return x_t, scan_decay(found.a, position)

    return [*map(gpu.load, (x, recurrence, input_, positions))], scan_inputs


def _read_adjoint(schedule, dy, recurrence, positions, a_param):
    ops = schedule.arithmetic
    decay = log_decay(a_param[...])

    def scan_inputs(dy_t, recurrence_t, position):
        exp = _exp(ops)
        r = ops.reciprocal(inverse_gate(recurrence_t, exp))
        a, _ = step_decay(r, decay, exp=exp, multiply_add=ops.multiply_add)
        return dy_t, scan_decay(a, position)

    return [*map(gpu.load, (dy, recurrence, positions))], scan_inputs


def _gradient_kernel(
    dy, x, recurrence, input_, positions, a_param, y, y_before, h0, d_last, products,
    ends, dx, d_recurrence, d_input, d_a_param, dh, *, schedule,
):  # fmt: skip
    ops = schedule.arithmetic
    decay = log_decay(a_param[...])

    def step(carry, inputs):
        c, total = carry
        dy_t, x_t, recurrence_t, input_t, position, before = inputs
        found = _gates(recurrence_t, input_t, decay, ops)
        g = dy_t + c
        *gradients, of_log_decay = step_gradients(
            g, before, x_t, found, decay, position, ops.rsqrt
        )
        c = scan_decay(found.a, position) * g
        return (c, total + of_log_decay), tuple(gradients)

    loads = [*map(gpu.load, (dy, x, recurrence, input_, positions))]
    loads.append(gpu.load_before(y, y_before, h0))
    c = gpu.first_state(d_last, products, ends, schedule)
    carry, outputs = (c, jnp.zeros_like(c)), [dx, d_recurrence, d_input]
    c, total = gpu.for_each_step(step, carry, loads, outputs, schedule)
    d_a_param[...] = a_param_gradient(a_param[...], total)
    gpu.store_last(dh, c, schedule)


def _gates(recurrence_logits, input_logits, log_decay, ops) -> Gates:
    return step_gates(
        *(recurrence_logits, input_logits, log_decay),
        exp=_exp(ops),
        reciprocal=ops.reciprocal,
        multiply_add=ops.multiply_add,
    )


def _exp(ops):
    return lambda value: ops.exp2(value * LOG2_E)


@partial(jax.jit, static_argnames=("interpret", "blocks"))
def recurrence(
    inputs: Inputs,
    *,
    interpret: bool = False,
    blocks: GpuBlocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`."""
    *sequences, a_param, positions, h0 = from_logits(inputs)
    blocks = blocks or gpu_blocks.find("rg_lru", sequences, interpret)
    schedule = gpu.choose_schedule(sequences, blocks, False, interpret)
    arrays = (*sequences, gpu.PerStep(positions), a_param)
    return scan_of("rg_lru", _read, arrays, h0, schedule)


@with_products
@partial(jax.jit, static_argnames=("interpret", "blocks"))
def gradients(
    arguments: tuple[Inputs],
    results: tuple[jax.Array, Any],
    upstream: tuple[jax.Array, jax.Array],
    *,
    interpret: bool = False,
    blocks: GpuBlocks | None = None,
) -> tuple[Inputs]:
    """See `Implementation.gradient`."""
    [(*sequences, a_param, positions, h0)] = arguments
    y, _ = results
    y_gradient, last_gradient = upstream
    blocks = blocks or gpu_blocks.find("rg_lru_gradient", sequences, interpret)
    schedule = gpu.choose_schedule(sequences, blocks, True, interpret)
    position = gpu.PerStep(positions)
    adjoint = (y_gradient, sequences[1], position, a_param)
    batch, _, width = y.shape
    per_chunk = jax.ShapeDtypeStruct((batch, schedule.chunks, width), jnp.float32)
    *of_sequences, of_a_param, of_h0 = gpu.call(
        partial(_gradient_kernel, schedule=schedule),
        "rg_lru_gradient",
        (
            *(y_gradient, *sequences, position, a_param, y, gpu.Before(y)),
            *(h0, last_gradient),
            *summaries("rg_lru_adjoint", _read_adjoint, adjoint, schedule, True),
        ),
        (*sequences, gpu.PerChunk(per_chunk), h0),
        schedule,
    )
    of_a_param = of_a_param.sum((0, 1)).astype(a_param.dtype)
    return (Inputs(*of_sequences, of_a_param, None, of_h0),)
