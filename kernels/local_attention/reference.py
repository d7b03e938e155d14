"""The definition of local attention: every query against every key, float32."""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings
from recurrentgemma.kernels.precision import einsum_float32

HIDDEN = -1e30
"""Score of a key that is not seen."""


def attend(chunk: Chunk, *, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """The output, and the logarithm of the sum of weights, float32 [B, T, N].

    See `local_attention`, which writes the cache.
    """
    weights, log_total = probabilities(chunk, settings)
    out = weighted_sum(weights, chunk.v, chunk.cache.values)
    return out.astype(chunk.q.dtype), log_total


def probabilities(chunk: Chunk, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """The weight of every key, float32 [B, T, N, S + T], and the logarithm of their sum
    before they were divided by it, float32 [B, T, N].

    The S cached keys come first, in the order of their slots.
    """
    q, k, _, positions, (keys, _, held) = chunk
    window, scale, soft_cap = settings
    batch, length, _, head_dim = q.shape
    # Cached keys are of segment 0, which the chunk's first start of a document ends.
    segments = jnp.cumsum(positions == 0, axis=1)
    k = jnp.concatenate([keys.astype(k.dtype), k], axis=1)
    key_positions = jnp.concatenate([held, positions], axis=1)
    key_segments = jnp.concatenate(
        [jnp.zeros_like(held, segments.dtype), segments], axis=1
    )
    distance = positions[:, :, None] - key_positions[:, None, :]
    visible = (segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    visible &= (key_positions >= 0)[:, None, :]
    if window is not None:
        visible &= distance <= window

    groups = q.astype(jnp.float32).reshape(batch, length, k.shape[2], -1, head_dim)
    scores = scale * einsum_float32("btkrh,bskh->bkrts", groups, k.astype(jnp.float32))
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    visible = visible[:, None, None]
    scores = jnp.where(visible, scores, HIDDEN)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jax.lax.stop_gradient(largest))
    # A padding query sees nothing; its output is zero.
    weights = jnp.where(visible, weights, 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total == 0, 1.0, total)
    log_total = jnp.moveaxis(largest + jnp.log(total), 3, 1)
    weights = jnp.moveaxis(weights / total, 3, 1)
    heads = q.shape[:3]
    return weights.reshape(*heads, -1), log_total.reshape(heads)


def weighted_sum(weights: jax.Array, v: jax.Array, values: jax.Array) -> jax.Array:
    """The output for these weights, float32 [B, T, N, H].

    Args:
      weights: float32 [B, T, N, S + T].
      v, values: of the chunk [B, T, K, H] and of the cache [B, S, K, H].
    """
    v = jnp.concatenate([values.astype(v.dtype), v], axis=1).astype(jnp.float32)
    groups = weights.reshape(*weights.shape[:2], v.shape[2], -1, weights.shape[3])
    out = einsum_float32("btkrs,bskh->btkrh", groups, v)
    return out.reshape(*weights.shape[:3], -1)
