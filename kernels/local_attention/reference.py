"""The definition of local attention: every query against every key, float32."""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.local_attention.ring import KVCache

HIDDEN = -1e30
"""Score of a key that is not seen."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    cache: KVCache | None,
    window: int | None,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """See `local_attention`; the written cache is not this function's business."""
    batch, length, _, head_dim = q.shape
    # Cached keys are of segment 0, which the chunk's first start of a document ends.
    segments = jnp.cumsum(positions == 0, axis=1)
    key_positions, key_segments = positions, segments
    if cache is not None:
        k = jnp.concatenate([cache.keys.astype(k.dtype), k], axis=1)
        v = jnp.concatenate([cache.values.astype(v.dtype), v], axis=1)
        key_positions = jnp.concatenate([cache.positions, positions], axis=1)
        key_segments = jnp.concatenate(
            [jnp.zeros_like(cache.positions, segments.dtype), segments], axis=1
        )
    distance = positions[:, :, None] - key_positions[:, None, :]
    visible = (segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    visible &= (key_positions >= 0)[:, None, :]
    if window is not None:
        visible &= distance <= window

    groups = q.astype(jnp.float32).reshape(batch, length, k.shape[2], -1, head_dim)
    scores = scale * jnp.einsum("btkrh,bskh->bkrts", groups, k.astype(jnp.float32))
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    visible = visible[:, None, None]
    scores = jnp.where(visible, scores, HIDDEN)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jax.lax.stop_gradient(largest))
    # A padding query sees nothing; its output is zero.
    weights = jnp.where(visible, weights, 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("bkrts,bskh->btkrh", weights, v.astype(jnp.float32))
    return out.reshape(q.shape[:3] + v.shape[3:]).astype(q.dtype)
