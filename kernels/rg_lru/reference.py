"""The definition of the RG-LRU (Griffin, section 2.4), float32, on the reference scan.

r_t, i_t = sigmoid(W_r x_t + b_r), sigmoid(W_i x_t + b_i)
log a_t = -8 * softplus(a_param) * r_t
h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * x_t
"""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.linear_scan.reference import scan
from recurrentgemma.kernels.rg_lru.gates import Inputs, product

DECAY_SCALE = 8.0
"""c of the paper: the decay is a^(c r)."""

MAX_SQRT_DERIVATIVE = 1000.0
"""Bound on the derivative of sqrt(1 - a^2), which has a pole at a = 1."""

SMALLEST_RADICAND = 1.0 / (4.0 * MAX_SQRT_DERIVATIVE**2)
"""Where the derivative of the square root reaches its bound."""


@jax.custom_jvp
def sqrt_bounded_derivative(u: jax.Array) -> jax.Array:
    """sqrt(u) whose derivative stops growing at `MAX_SQRT_DERIVATIVE`."""
    return jnp.sqrt(u)


@sqrt_bounded_derivative.defjvp
def _sqrt_jvp(primals, tangents):
    (u,), (tangent,) = primals, tangents
    derivative = 0.5 * jax.lax.rsqrt(jnp.maximum(u, SMALLEST_RADICAND))
    return jnp.sqrt(u), derivative * tangent


def log_decay(a_param: jax.Array) -> jax.Array:
    """log a_t / r_t = -8 softplus(a_param), float32."""
    # Not jax.nn.softplus, whose case of NaN the compilers of kernels do not take.
    a_param = a_param.astype(jnp.float32)
    softplus = jnp.maximum(a_param, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(a_param)))
    return -DECAY_SCALE * softplus


def gate_values(
    recurrence_logits: jax.Array, input_logits: jax.Array, a_param: jax.Array
) -> tuple[jax.Array, ...]:
    """r_t, i_t, log a_t / r_t, a_t and 1 - a_t^2, float32."""
    r = jax.nn.sigmoid(recurrence_logits.astype(jnp.float32))
    i = jax.nn.sigmoid(input_logits.astype(jnp.float32))
    c = log_decay(a_param)[None, None]
    log_a = c * r
    # 1 - a^2 in this form keeps its digits where a is close to 1.
    return r, i, c, jnp.exp(log_a), -jnp.expm1(2.0 * log_a)


def input_factor(u: jax.Array, position: jax.Array) -> jax.Array:
    """The factor of i_t x_t, from 1 - a_t^2: 1 where a document starts."""
    return jnp.where(position == 0, 1.0, sqrt_bounded_derivative(u))


def scan_decay(a: jax.Array, position: jax.Array) -> jax.Array:
    """The decay of the scan: 0 where a document starts, 1 where the state is held."""
    return jnp.where(position == 0, 0.0, jnp.where(position < 0, 1.0, a))


def recurrence(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`."""
    scan_input, a = scan_inputs(inputs)
    y, h_last = scan(scan_input, a, inputs.h0, reverse=False)
    return y.astype(inputs.x.dtype), h_last


def one_step(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The same for T = 1, without a loop."""
    scan_input, a = scan_inputs(inputs)
    h = a[:, 0] * inputs.h0 + scan_input[:, 0]
    return h.astype(inputs.x.dtype)[:, None], h


def scan_inputs(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Inputs and decays of the linear scan, float32 [B, T, E]."""
    x, recurrence_gate, input_gate, a_param, positions, _ = inputs
    logits = product(x, recurrence_gate), product(x, input_gate)
    _, i, _, a, u = gate_values(*logits, a_param)
    position = positions[..., None]
    scan_input = input_factor(u, position) * (i * x.astype(jnp.float32))
    return jnp.where(position < 0, 0.0, scan_input), scan_decay(a, position)
