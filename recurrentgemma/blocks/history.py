"""States that reach back in time: [B, S, ...], one for each of the last S tokens.

A recurrent state becomes rewindable by keeping what it was after each of the last
1 + K tokens.
"""

import jax
import jax.numpy as jnp


def keep_newest(states: jax.Array, size: int) -> jax.Array:
    """[B, S, E] -> [B, size, E]: the newest ones, zeros before them."""
    states = jnp.pad(states, ((0, 0), (max(size - states.shape[1], 0), 0), (0, 0)))
    return states[:, states.shape[1] - size :]


def extend(history: jax.Array, states: jax.Array, lengths: jax.Array) -> jax.Array:
    """The history after a chunk.

    Args:
      history: [B, S, E], the newest last.
      states: [B, T, E], after each token of the chunk.
      lengths: int32 [B], tokens of each row, which is padded at its end.

    Returns:
      [B, S, E].
    """
    joined = jnp.concatenate([history, states], axis=1)
    steps = jnp.arange(history.shape[1], dtype=jnp.int32)[None]
    index = lengths[:, None] + steps
    return jnp.take_along_axis(joined, index[..., None], axis=1)


def step_back(history: jax.Array, counts: jax.Array) -> jax.Array:
    """The history before the last `counts` (int32 [B]) tokens.

    The oldest entry fills up what is missing: it is too old to matter.
    """
    steps = jnp.arange(history.shape[1], dtype=jnp.int32)[None]
    index = jnp.maximum(steps - counts[:, None], 0)
    return jnp.take_along_axis(history, index[..., None], axis=1)
