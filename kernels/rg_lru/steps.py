"""A step of the RG-LRU from its logits on, and its gradient: what every kernel computes.

Padding and document starts become data of the scan: a held step has decay 1 and input
0, a start has decay 0 and input factor 1. A position may be given by its sign alone.
Everything is float32. Functions that a platform computes in its own way are arguments:
exp, reciprocal, rsqrt, and a * b + c.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.rg_lru.reference import DECAY_SCALE, SMALLEST_RADICAND

SMALLEST_SQUARE = 1e-30
"""Keeps the reciprocal of a square root finite."""
MOST_NEGATIVE_LOGIT = -40.0
"""Logits below it count as it: a gate of 4e-18. Products of exponentials stay finite."""
SERIES_BELOW = 1 / 16
"""Where -log a is smaller, 1 - a is a series. An exponential is off by some units in the
last place of 1: of 1 - a = 1e-6 that is up to a tenth, and so of the memory."""
SERIES = (1.0, -1 / 2, 1 / 6, -1 / 24)
"""Coefficients of (1 - exp(-v)) / v. The next term, v^4 / 120, is at most 1.3e-7."""

Function = Callable[[Any], jax.Array]
MultiplyAdd = Callable[[Any, Any, Any], jax.Array]


class Gates(NamedTuple):
    """What the gates make of a step's logits."""

    r: jax.Array
    i: jax.Array
    a: jax.Array
    """The decay."""
    u: jax.Array
    """1 - a^2."""


def _multiply_add(a, b, c):
    return a * b + c


def step_gates(
    recurrence_logits: jax.Array,
    input_logits: jax.Array,
    log_decay: jax.Array,
    *,
    exp: Function,
    reciprocal: Function,
    multiply_add: MultiplyAdd = _multiply_add,
) -> Gates:
    """The gates of a step; log_decay is log a / r."""
    over_r = inverse_gate(recurrence_logits, exp)
    over_i = inverse_gate(input_logits, exp)
    # One reciprocal serves both gates.
    inverse = reciprocal(over_r * over_i)
    r, i = inverse * over_i, inverse * over_r
    return Gates(r, i, *step_decay(r, log_decay, exp=exp, multiply_add=multiply_add))


def inverse_gate(logits: jax.Array, exp: Function) -> jax.Array:
    """1 / sigmoid(logits)."""
    return 1.0 + exp(-jnp.maximum(logits.astype(jnp.float32), MOST_NEGATIVE_LOGIT))


def step_decay(
    r: jax.Array,
    log_decay: jax.Array,
    *,
    exp: Function,
    multiply_add: MultiplyAdd = _multiply_add,
) -> tuple[jax.Array, jax.Array]:
    """a and 1 - a^2."""
    v = -log_decay * r
    series = jnp.full_like(v, SERIES[-1])
    for coefficient in reversed(SERIES[:-1]):
        series = multiply_add(series, v, coefficient)
    near, forgotten, a = v < SERIES_BELOW, v * series, exp(-v)
    a = jnp.where(near, 1.0 - forgotten, a)
    return a, jnp.where(near, forgotten * (2.0 - forgotten), 1.0 - a * a)


def scan_input(
    x: jax.Array, gates: Gates, position: jax.Array, rsqrt: Function = jax.lax.rsqrt
) -> jax.Array:
    """The input of the scan."""
    root = gates.u * _inverse_root(gates.u, rsqrt)
    value = jnp.where(position == 0, 1.0, root) * gates.i * x
    return jnp.where(position < 0, 0.0, value)


def step_gradients(
    g: jax.Array,
    before: jax.Array,
    x: jax.Array,
    gates: Gates,
    log_decay: jax.Array,
    position: jax.Array,
    rsqrt: Function = jax.lax.rsqrt,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of x, of the logits of r and i, and of log a / r.

    Args:
      g: gradient of the state after the step.
      before: state before it.
      x: input.
      gates: of the step; a may be that of the scan.
      log_decay: log a / r.
      position: of the step.
      rsqrt: 1 / sqrt.
    """
    r, i, a, u = gates
    inverse_root = _inverse_root(u, rsqrt)
    factor = jnp.where(position == 0, 1.0, u * inverse_root)
    of_x = jnp.where(position < 0, 0.0, g) * factor * i
    # d sqrt(1 - a^2) / d log a = -a^2 / sqrt(1 - a^2), bounded.
    slope = a * jnp.minimum(inverse_root, SMALLEST_RADICAND**-0.5)
    of_log_a = a * g * (before - i * x * slope)
    # Where a document starts or the state is held, the gates do not matter.
    of_log_decay = jnp.where(position > 0, of_log_a * r, 0.0)
    return (
        of_x,
        of_log_decay * log_decay * (1.0 - r),
        of_x * x * (1.0 - i),
        of_log_decay,
    )


def a_param_gradient(a_param: jax.Array, of_log_decay: jax.Array) -> jax.Array:
    """The gradient of a_param, float32, from that of log a / r."""
    return -DECAY_SCALE * jax.nn.sigmoid(a_param.astype(jnp.float32)) * of_log_decay


def _inverse_root(u, rsqrt):
    return rsqrt(jnp.maximum(u, SMALLEST_SQUARE))
