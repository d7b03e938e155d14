"""The definition of the decode step, of a convolution and the RG-LRU after it.

u = bias + sum_k kernel[k] * (inputs of k = taps - 1, ..., 1, 0 steps ago)[k]
r, i = sigmoid(W_r u + b_r), sigmoid(W_i u + b_i)
log a = -8 * softplus(a_param) * r
h = a * h + sqrt(1 - a^2) * i * u

The convolution is float32 and rounded to x's dtype, and so are the logits of the gates;
everything behind them is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.rg_lru import rg_lru
from recurrentgemma.kernels.rg_lru.gates import Gate


class StepParameters(NamedTuple):
    """Parameters of the convolution and of the RG-LRU after it, floating point."""

    conv_kernel: jax.Array
    """[taps, E]; the last row multiplies the current token."""
    conv_bias: jax.Array
    """[E]."""
    recurrence_gate: Gate
    """G blocks of E / G channels."""
    input_gate: Gate
    """Likewise."""
    a_param: jax.Array
    """Lambda of the Griffin paper [E]."""


def step(
    x: jax.Array,
    parameters: StepParameters,
    positions: jax.Array,
    h: jax.Array,
    conv_state: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `recurrent_step`."""
    p = parameters
    u, conv_state = convolve(x, p.conv_kernel, p.conv_bias, positions, conv_state)
    arguments = (u[:, None], p.recurrence_gate, p.input_gate, p.a_param)
    y, h = rg_lru(*arguments, positions[:, None], h)
    return y[:, 0], h, conv_state


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    positions: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The convolution's output [B, E] and its state [B, taps - 1, E], in x's dtype."""
    reach = kernel.shape[0] - 1
    wide = kernel.astype(jnp.float32)[:, None]
    y = x.astype(jnp.float32) * wide[reach] + bias.astype(jnp.float32)[None]
    for back in range(1, reach + 1):
        same_document = (positions >= back)[:, None]
        tap = state[:, reach - back].astype(jnp.float32) * wide[reach - back]
        y = y + jnp.where(same_document, tap, 0.0)

    shifted = jnp.concatenate([state, x[:, None]], axis=1)[:, 1:]
    oldest_first = jnp.arange(reach - 1, -1, -1, dtype=positions.dtype)[None]
    inside = (positions[:, None] >= oldest_first)[..., None]
    shifted = jnp.where(inside, shifted, 0)
    holds = (positions < 0)[:, None, None]
    return y.astype(x.dtype), jnp.where(holds, state, shifted)
