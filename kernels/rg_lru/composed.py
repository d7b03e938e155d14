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
from recurrentgemma.kernels.rg_lru.gates import Gate, logits, with_products
from recurrentgemma.kernels.rg_lru.reference import (
    DECAY_SCALE,
    SMALLEST_RADICAND,
    log_decay,
)


def recurrence(
    x: jax.Array,
    recurrence_gate: Gate | jax.Array,
    input_gate: Gate | jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array,
    *,
    linear_scan: str | None,
) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`."""
    _, i, _, a, u = _gates(logits(x, recurrence_gate), logits(x, input_gate), a_param)
    starts, holds = _starts_and_holds(positions)
    multiplier = jnp.where(starts, 1.0, jnp.sqrt(u))
    scan_input = jnp.where(holds, 0.0, multiplier * i * x.astype(jnp.float32))
    decay = jnp.where(starts, 0.0, jnp.where(holds, 1.0, a))
    scan = (scan_input, decay, h0)
    y, h_last = forward(LINEAR_SCAN, linear_scan, *scan, reverse=False)
    return y.astype(x.dtype), h_last


@with_products
def gradients(
    arguments: tuple[Any, ...],
    results: tuple[Any, ...],
    upstream: tuple[jax.Array, ...],
    *,
    linear_scan: str | None,
) -> tuple[Any, ...]:
    """See `Implementation.gradient`."""
    x, recurrence_logits, input_logits, a_param, positions, h0 = arguments
    y_gradient, last_gradient = upstream
    r, i, c, a, u = _gates(recurrence_logits, input_logits, a_param)
    starts, holds = _starts_and_holds(positions)
    decay = jnp.where(starts, 0.0, jnp.where(holds, 1.0, a))
    input_gradient, decay_gradient, h0_gradient = linear_scan_gradients(
        decay,
        h0,
        results[0].astype(jnp.float32),
        y_gradient.astype(jnp.float32),
        last_gradient,
        implementation=linear_scan,
    )
    multiplier = jnp.where(holds, 0.0, jnp.where(starts, 1.0, jnp.sqrt(u)))
    wide_x = x.astype(jnp.float32)

    x_gradient = input_gradient * multiplier * i
    # d sqrt(1 - a^2) / d log a = -a^2 / sqrt(1 - a^2), bounded.
    slope = a * jax.lax.rsqrt(jnp.maximum(u, SMALLEST_RADICAND))
    log_a_gradient = a * (decay_gradient - input_gradient * i * wide_x * slope)
    # Where a document starts or the state is held, the gates do not matter.
    log_a_gradient = jnp.where(starts | holds, 0.0, log_a_gradient)
    per_gate = log_a_gradient * r
    a_param_gradient = (
        -DECAY_SCALE
        * jax.nn.sigmoid(a_param.astype(jnp.float32))
        * jnp.sum(per_gate, axis=(0, 1))
    )
    return (
        x_gradient.astype(x.dtype),
        (per_gate * c * (1.0 - r)).astype(recurrence_logits.dtype),
        (x_gradient * wide_x * (1.0 - i)).astype(input_logits.dtype),
        a_param_gradient.astype(a_param.dtype),
        None,
        h0_gradient,
    )


def _gates(recurrence_logits, input_logits, a_param):
    """r_t, i_t, log a_t / r_t, a_t and 1 - a_t^2, in float32."""
    r = jax.nn.sigmoid(recurrence_logits.astype(jnp.float32))
    i = jax.nn.sigmoid(input_logits.astype(jnp.float32))
    c = log_decay(a_param)[None, None]
    log_a = c * r
    # 1 - a^2 in this form keeps its digits where a is close to 1.
    return r, i, c, jnp.exp(log_a), -jnp.expm1(2.0 * log_a)


def _starts_and_holds(positions):
    return (positions == 0)[..., None], (positions < 0)[..., None]
