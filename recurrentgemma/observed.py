"""What an observer sees or changes of a recurrence, and no op forms.

A recurrence is h_t = a_t h_{t-1} + b_t x_t, channel by channel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma.chunk import Chunk


def effective_attention(factors: jax.Array, decays: jax.Array) -> jax.Array:
    """The linear operator that a recurrence applies over time, channel by channel.

    M[t, s] = b_s a_{s+1} ... a_t for s <= t, so that h_t = sum_s M[t, s] x_s where the
    state before the first token is zero: the weights of an attention layer that has a
    head for each channel (arXiv 2405.16504, section 3).

    Args:
      factors: b, float32 [B, T, E].
      decays: a, float32 [B, T, E].

    Returns:
      M, float32 [B, T, E, T], as many numbers as that.
    """
    batch_size, length, width = factors.shape

    def step(row, inputs):
        index, factor, decay = inputs
        now = jnp.arange(length, dtype=jnp.int32)[None, None] == index
        row = decay[..., None] * row + jnp.where(now, factor[..., None], 0.0)
        return row, row

    zero = jnp.zeros((batch_size, width, length), jnp.float32)
    steps = jnp.arange(length, dtype=jnp.int32)
    _, rows = jax.lax.scan(step, zero, (steps, *map(_time_first, (factors, decays))))
    return jnp.moveaxis(rows, 0, 1)


def advance(h: jax.Array, token: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The state after one token: h [B, E] and (x, a), each [B, 1, E] -> [B, E]."""
    x, a = token
    return a[:, 0] * h + x[:, 0]


def replaced_states(
    inputs: Any,
    h0: jax.Array,
    chunk: Chunk,
    advance: Callable[[jax.Array, Any], jax.Array] = advance,
) -> jax.Array:
    """The states of a recurrence in which the observer replaces each one, `state`.

    The next token starts from the state that the observer returned, so that one token
    is computed after another. Padding holds the state.

    Args:
      inputs: a tree of [B, T, ...].
      h0: the state before the first token, [B, E].
      chunk: positions of the tokens.
      advance: (h [B, E], inputs of one token [B, 1, ...]) -> h [B, E].

    Returns:
      [B, T, E].
    """

    def step(h, token):
        positions, inputs = token
        positions = positions[:, None]
        new = advance(h, jax.tree.map(lambda x: x[:, None], inputs))
        new = chunk.replace("state", new[:, None], positions)[:, 0]
        new = jnp.where(positions < 0, h, new)
        return new, new

    tokens = jax.tree.map(_time_first, (chunk.positions, inputs))
    _, states = jax.lax.scan(step, h0, tokens)
    return jnp.moveaxis(states, 0, 1)


def _time_first(x):
    return jnp.moveaxis(x, 1, 0)
