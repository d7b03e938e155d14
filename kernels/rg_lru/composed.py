"""RG-LRU as an elementwise part, then a linear scan.

The gradient recomputes gates and decay from the arguments: automatic differentiation
keeps a dozen arrays as large as x, and its sum over time for a_param takes longer than
all the rest of the backward pass.
"""

from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import forward
from recurrentgemma.kernels.linear_scan import LINEAR_SCAN, linear_scan_gradients
from recurrentgemma.kernels.linear_scan.chunked import shifted
from recurrentgemma.kernels.rg_lru.gates import Inputs, from_logits, with_products
from recurrentgemma.kernels.rg_lru.reference import (
    SMALLEST_RADICAND,
    gate_values,
    input_factor,
    scan_decay,
    scan_inputs,
)
from recurrentgemma.kernels.rg_lru.steps import a_param_gradient


def recurrence(
    inputs: Inputs, *, linear_scan: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`."""
    inputs = from_logits(inputs)
    scan = (*scan_inputs(inputs), inputs.h0)
    y, h_last = forward(LINEAR_SCAN, linear_scan, *scan, reverse=False)
    return y.astype(inputs.x.dtype), h_last


@with_products
def gradients(
    arguments: tuple[Inputs],
    results: tuple[jax.Array, Any],
    upstream: tuple[jax.Array, jax.Array],
    *,
    linear_scan: str | None = None,
) -> tuple[Inputs]:
    """See `Implementation.gradient`."""
    ((x, recurrence_logits, input_logits, a_param, positions, h0),) = arguments
    y_gradient, last_gradient = upstream
    r, i, c, a, u = gate_values(recurrence_logits, input_logits, a_param)
    position = positions[..., None]
    states = results[0].astype(jnp.float32)
    input_gradient, _, h0_gradient = linear_scan_gradients(
        scan_decay(a, position),
        h0,
        states,
        y_gradient.astype(jnp.float32),
        last_gradient,
        implementation=linear_scan,
    )
    before = shifted(states, h0, towards_start=False)
    wide_x = x.astype(jnp.float32)
    factor = jnp.where(position < 0, 0.0, input_factor(u, position))
    of_x = input_gradient * factor * i
    # d sqrt(1 - a^2) / d log a = -a^2 / sqrt(1 - a^2), bounded.
    slope = a * jax.lax.rsqrt(jnp.maximum(u, SMALLEST_RADICAND))
    of_log_a = a * input_gradient * (before - i * wide_x * slope)
    # Where a document starts or the state is held, the gates do not matter.
    per_gate = jnp.where(position > 0, of_log_a, 0.0) * r
    of_a_param = a_param_gradient(a_param, jnp.sum(per_gate, axis=(0, 1)))
    found = Inputs(
        of_x.astype(x.dtype),
        (per_gate * c * (1.0 - r)).astype(recurrence_logits.dtype),
        (of_x * wide_x * (1.0 - i)).astype(input_logits.dtype),
        of_a_param.astype(a_param.dtype),
        None,
        h0_gradient,
    )
    return (found,)
