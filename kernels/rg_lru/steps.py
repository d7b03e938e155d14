"""A step of the RG-LRU from its gates on, and its gradient: for the kernels.

Padding and document starts become data of the scan: a held step has decay 1 and input
0, a start has decay 0 and input factor 1. A position may be given by its sign alone.
Everything is float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.rg_lru.reference import DECAY_SCALE, SMALLEST_RADICAND

SMALLEST_SQUARE = 1e-30
"""Keeps the reciprocal of a square root finite."""


class Gates(NamedTuple):
    """What the gates make of a step's logits."""

    r: jax.Array
    i: jax.Array
    a: jax.Array
    """The decay."""
    u: jax.Array
    """1 - a^2."""


def scan_input(x: jax.Array, gates: Gates, position: jax.Array) -> jax.Array:
    """The input of the scan."""
    root = gates.u * _inverse_root(gates.u, jax.lax.rsqrt)
    value = jnp.where(position == 0, 1.0, root) * gates.i * x
    return jnp.where(position < 0, 0.0, value)


def step_gradients(
    g: jax.Array,
    before: jax.Array,
    x: jax.Array,
    gates: Gates,
    log_decay: jax.Array,
    position: jax.Array,
    rsqrt: Callable[[jax.Array], jax.Array] = jax.lax.rsqrt,
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
