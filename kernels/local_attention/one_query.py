"""Local attention of a single token to the ring and itself: the decode step.

The ring is read where it lies, in slot order; the token's own key and value are joined
in the softmax instead of being written first, because their slot still holds the oldest
key that the query may see.

XLA for CPU multiplies batches of matrices only where the batch is outermost. The heads
of a ring are not: for several key heads it would copy the ring twice a step. There all
heads are one product with a block-diagonal matrix, which reads the ring as it lies and
computes K times as much; as long as K is small, the reading takes longer.
"""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings
from recurrentgemma.kernels.local_attention.reference import HIDDEN
from recurrentgemma.kernels.precision import einsum_float32

MOST_JOINED_HEADS = 8
"""Key heads that one product takes on a CPU."""


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
        scores = scale * _by_platform(_scores, _scores_of_joined_heads, groups, keys)
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
    operands = cached_weights.astype(v.dtype), values.astype(v.dtype)
    out = _by_platform(_sums, _sums_of_joined_heads, *operands)
    out = out + own_weight * jnp.moveaxis(v, 1, 2).astype(jnp.float32)
    log_total = (largest + jnp.log(total)).reshape(q.shape[:3])
    return (out / total).reshape(q.shape).astype(q.dtype), log_total


def _by_platform(plain, joined, left, ring):
    """`joined` on a CPU where the ring [B, S, K, H] has a few key heads, else `plain`."""
    if not 1 < ring.shape[2] <= MOST_JOINED_HEADS:
        return plain(left, ring)
    return jax.lax.platform_dependent(left, ring, cpu=joined, default=plain)


def _scores(groups, keys):
    """[B, K, R, H] and [B, S, K, H] -> [B, K, R, S]."""
    # Keys first: as the second operand XLA would transpose them, a copy a step.
    return jnp.swapaxes(einsum_float32("bskh,bkrh->bksr", keys, groups), 2, 3)


def _sums(weights, values):
    """[B, K, R, S] and [B, S, K, H] -> [B, K, R, H]."""
    return einsum_float32("bkrs,bskh->bkrh", weights, values)


def _scores_of_joined_heads(groups, keys):
    batch, heads, rows, size = groups.shape
    own = jnp.eye(heads, dtype=groups.dtype)
    matrix = jnp.einsum("bkrh,kj->bkhjr", groups, own)
    matrix = matrix.reshape(batch, heads * size, heads * rows)
    keys = keys.reshape(batch, -1, heads * size)
    scores = einsum_float32("bsc,bcn->bsn", keys, matrix)
    return jnp.moveaxis(scores, 1, 2).reshape(batch, heads, rows, -1)


def _sums_of_joined_heads(weights, values):
    batch, heads, rows, slots = weights.shape
    size = values.shape[3]
    weights = weights.reshape(batch, heads * rows, slots)
    values = values.reshape(batch, slots, heads * size)
    sums = einsum_float32("bns,bsc->bnc", weights, values)
    sums = sums.reshape(batch, heads, rows, heads, size)
    return jnp.moveaxis(jnp.diagonal(sums, axis1=1, axis2=3), 3, 1)
