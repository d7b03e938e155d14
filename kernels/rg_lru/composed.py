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
from recurrentgemma.kernels.rg_lru.gates import Inputs, from_logits, with_products
from recurrentgemma.kernels.rg_lru.reference import (
    SMALLEST_RADICAND,
    gate_values,
    scan_decay,
)
from recurrentgemma.kernels.rg_lru.steps import a_param_gradient


def recurrence(
    inputs: Inputs, *, linear_scan: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`."""
    x, *logits, a_param, positions, h0 = from_logits(inputs)
    _, i, _, a, u = gate_values(*logits, a_param)
    position = positions[..., None]
    multiplier = jnp.where(position == 0, 1.0, jnp.sqrt(u))
    scan_input = jnp.where(position < 0, 0.0, multiplier * i * x.astype(jnp.float32))
    scan = (scan_input, scan_decay(a, position), h0)
    y, h_last = forward(LINEAR_SCAN, linear_scan, *scan, reverse=False)
    return y.astype(x.dtype), h_last


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
    input_gradient, decay_gradient, h0_gradient = linear_scan_gradients(
        scan_decay(a, position),
        h0,
        results[0].astype(jnp.float32),
        y_gradient.astype(jnp.float32),
        last_gradient,
        implementation=linear_scan,
    )
    multiplier = jnp.where(position == 0, 1.0, jnp.sqrt(u))
    multiplier = jnp.where(position < 0, 0.0, multiplier)
    wide_x = x.astype(jnp.float32)

    x_gradient = input_gradient * multiplier * i
    # d sqrt(1 - a^2) / d log a = -a^2 / sqrt(1 - a^2), bounded.
    slope = a * jax.lax.rsqrt(jnp.maximum(u, SMALLEST_RADICAND))
    log_a_gradient = a * (decay_gradient - input_gradient * i * wide_x * slope)
    # Where a document starts or the state is held, the gates do not matter.
    per_gate = jnp.where(position > 0, log_a_gradient, 0.0) * r
    found = Inputs(
        x_gradient.astype(x.dtype),
        (per_gate * c * (1.0 - r)).astype(recurrence_logits.dtype),
        (x_gradient * wide_x * (1.0 - i)).astype(input_logits.dtype),
        a_param_gradient(a_param, jnp.sum(per_gate, axis=(0, 1))).astype(a_param.dtype),
        None,
        h0_gradient,
    )
    return (found,)
