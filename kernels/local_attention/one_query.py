"""Local attention of a single token to the ring and itself: the decode step.

The ring is read where it lies, in slot order; the token's own key and value are joined
in the softmax instead of being written first, because their slot still holds the oldest
key that the query may see.
"""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings
from recurrentgemma.kernels.local_attention.reference import HIDDEN
from recurrentgemma.kernels.precision import einsum_float32


def supports(chunk: Chunk, *, settings: Settings) -> str | None:
    """Why these arguments do not fit, or None."""
    del settings
    if chunk.q.shape[1] != 1:
        return f"it takes one query a row, not {chunk.q.shape[1]}"
    return None if chunk.cache.positions.shape[1] else "it takes a cache"


def attend(chunk: Chunk, *, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """See `reference.attend`; T = 1."""
    q, k, v, positions, (keys, values, held) = chunk
    window, scale, soft_cap = settings
    batch, head_dim = q.shape[0], q.shape[3]
    groups = q.reshape(batch, k.shape[2], -1, head_dim)
    distance = positions - held
    visible = (held >= 0) & (distance > 0)
    if window is not None:
        visible &= distance <= window

    def score(keys):
        # Keys first: as the second operand XLA would transpose them, a copy a step.
        scores = scale * einsum_float32("bskh,bkrh->bksr", keys, groups)
        scores = jnp.swapaxes(scores, 2, 3)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        return scores

    cached_scores = score(keys.astype(k.dtype))
    cached_scores = jnp.where(visible[:, None, None], cached_scores, HIDDEN)
    own_score = score(k)
    largest = jnp.maximum(jnp.max(cached_scores, axis=-1, keepdims=True), own_score)
    largest = jax.lax.stop_gradient(largest)
    cached_weights = jnp.exp(cached_scores - largest)
    own_weight = jnp.exp(own_score - largest)
    total = jnp.sum(cached_weights, axis=-1, keepdims=True) + own_weight
    out = einsum_float32(
        "bkrs,bskh->bkrh",
        cached_weights.astype(v.dtype),
        values.astype(v.dtype),
    )
    out = out + own_weight * jnp.moveaxis(v, 1, 2).astype(jnp.float32)
    log_total = (largest + jnp.log(total)).reshape(q.shape[:3])
    return (out / total).reshape(q.shape).astype(q.dtype), log_total
