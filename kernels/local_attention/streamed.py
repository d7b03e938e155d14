"""Global attention of a chunk to a long ring, which is read where it lies.

What a query of `blocked.py` sees is a range of keys in time order, for which the whole
ring is copied. Here the ring stays in slot order: it is visited block by block, up to
the last slot that holds a token, and each slot's position says who sees it. The chunk's
own keys come first, by `blocked.py`; every block of the ring then joins the softmax:

    m' = max(m, scores)    out' = e^(m - m') out + e^(scores - m') V    (same for the sum)

(FlashAttention, arXiv 2205.14135, section 3.1). Memory does not depend on the number of
slots, and time on the tokens held alone. The gradient is that of `blocked.py`.
"""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.local_attention import blocked, ring
from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings
from recurrentgemma.kernels.local_attention.reference import HIDDEN
from recurrentgemma.kernels.precision import einsum_float32

LEAST_SLOTS = 1024
"""Fewest slots of a ring that is read so. Shorter rings are not worth two parts."""
SCORES = 1 << 22
"""Scores that a block may have, of all rows, heads and queries."""
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 1024
"""Slots of a block."""


def supports(chunk: Chunk, *, settings: Settings) -> str | None:
    """Why these arguments do not fit, or None."""
    slots = chunk.cache.positions.shape[1]
    if settings.window is not None:
        return f"it takes no window, not one of {settings.window}"
    if slots < LEAST_SLOTS:
        return f"it takes a ring of at least {LEAST_SLOTS} slots, not {slots}"
    return None


def attend(chunk: Chunk, *, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """See `reference.attend`."""
    q, k, v, positions, (keys, values, held) = chunk
    batch, length, heads, _ = q.shape
    key_heads, slots = k.shape[2], held.shape[1]
    alone = chunk._replace(cache=ring.empty(k, v, 0))
    own, own_log_total = blocked.attend(alone, settings=settings)

    def to_rows(array):
        """[B, T, N, ...] as [B, K, T N/K, ...]."""
        array = array.reshape(batch, length, key_heads, heads // key_heads, -1)
        return jnp.moveaxis(array, 2, 1).reshape(batch, key_heads, -1, array.shape[-1])

    def from_rows(rows):
        rows = rows.reshape(batch, key_heads, length, heads // key_heads, -1)
        return jnp.moveaxis(rows, 1, 2).reshape(batch, length, heads, -1)

    # A document that starts in the chunk sees nothing of the ring.
    continues = jnp.cumsum(positions == 0, axis=1) == 0
    reach = jnp.where(continues, positions, -1)
    reach = jnp.repeat(reach, heads // key_heads, axis=1)[:, None, :, None]
    queries = to_rows(q)
    block = _block_size(batch * heads * length, slots)

    def visit(index, carry):
        out, largest, total = carry
        # The last block may begin in the one before, whose slots do not count again.
        start = jnp.minimum(index * block, slots - block)
        part = (
            jax.lax.dynamic_slice_in_dim(array, start, block, axis=1)
            for array in (keys, values, held)
        )
        block_keys, block_values, block_held = part
        slot = start + jnp.arange(block, dtype=jnp.int32)[None]
        block_held = jnp.where(slot >= index * block, block_held, -1)[:, None, None]
        scores = settings.scale * einsum_float32(
            "bkmh,bskh->bkms", queries, block_keys.astype(k.dtype)
        )
        if settings.soft_cap is not None:
            scores = settings.soft_cap * jnp.tanh(scores / settings.soft_cap)
        visible = (block_held >= 0) & (block_held < reach)
        scores = jnp.where(visible, scores, HIDDEN)
        larger = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        kept, weights = jnp.exp(largest - larger), jnp.exp(scores - larger)
        added = einsum_float32(
            "bkms,bskh->bkmh", weights.astype(v.dtype), block_values.astype(v.dtype)
        )
        total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
        return out * kept + added, larger, total

    filled = jnp.max(jnp.where(held >= 0, jnp.arange(slots, dtype=jnp.int32)[None], -1))
    log_rows = to_rows(own_log_total)
    start = to_rows(own).astype(jnp.float32), log_rows, jnp.ones_like(log_rows)
    out, largest, total = jax.lax.fori_loop(0, filled // block + 1, visit, start)
    log_total = from_rows(largest + jnp.log(total))[..., 0]
    return from_rows(out / total).astype(q.dtype), log_total


def _block_size(queries: int, slots: int) -> int:
    block = LARGEST_BLOCK
    while block > SMALLEST_BLOCK and block * queries > SCORES:
        block //= 2
    return min(block, slots)
