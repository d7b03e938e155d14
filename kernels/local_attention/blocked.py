"""Local attention in blocks of queries: time and memory linear in T, both directions.

The keys are laid out in time order, cache first, so that what a query sees is one
contiguous range of them: from `first_key` (start of its document, of the cached tokens
or of its window, whichever is latest) to itself. A block of C queries then needs C +
window keys, a slice. The backward pass is FlashAttention-2's (arXiv 2307.08691): it
recomputes each block's weights from the logsumexp and adds the gradients of the slice
in place. One query (decode) is in `one_query.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import einsum_float32
from recurrentgemma.kernels.local_attention import one_query, ring
from recurrentgemma.kernels.local_attention.ring import KVCache

SMALLEST_BLOCK = 64
LARGEST_BLOCK = 256
BLOCKS_PER_WINDOW = 8
"""A window of eight blocks computes at most an eighth more than it keeps."""

NO_SCORE = -1e30
"""Stands for minus infinity without making NaN in a row that sees nothing."""


class _Options(NamedTuple):
    block: int  # Queries a block.
    span: int  # Keys a block attends to.
    scale: float
    soft_cap: float | None


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
    length = q.shape[1]
    if cache is not None and length == 1:
        return one_query.attend(q, k, v, positions, cache, window, scale, soft_cap)
    cached = jnp.zeros_like(positions[:, 0])
    if cache is not None:
        past = ring.chronological(cache)
        k = jnp.concatenate([past.keys.astype(k.dtype), k], axis=1)
        v = jnp.concatenate([past.values.astype(v.dtype), v], axis=1)
        cached = jnp.sum(past.positions >= 0, axis=1, dtype=jnp.int32)
    first_key = _first_visible_key(positions, cached, k.shape[1] - length, window)

    block = block_size(length, window)
    padding = -length % block
    pad = [(0, 0), (0, padding), (0, 0), (0, 0)]
    q, k, v = jnp.pad(q, pad), jnp.pad(k, pad), jnp.pad(v, pad)
    # A query beyond the end begins to see keys after the last one: it sees none.
    first_key = jnp.pad(first_key, pad[:2], constant_values=k.shape[1])
    span = k.shape[1] if window is None else min(window + block, k.shape[1])
    out = _banded(q, k, v, first_key, _Options(block, span, scale, soft_cap))
    return out[:, :length]


def block_size(length: int, window: int | None) -> int:
    """Queries a block: a multiple of 8 unless one block takes the whole chunk."""
    block = LARGEST_BLOCK
    if window is not None:
        block = -(-window // BLOCKS_PER_WINDOW // 8) * 8
        block = min(max(block, SMALLEST_BLOCK), LARGEST_BLOCK)
    return min(block, length)


def _first_visible_key(positions, cached, front, window):
    """Index of the first key that each query sees, int32 [B, T].

    Keys are [front cached ones, of which the last `cached` are filled; chunk].
    """
    index = front + jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
    document = jax.lax.cummax(jnp.where(positions == 0, index, 0), axis=1)
    first = jnp.maximum(document, (front - cached)[:, None])
    if window is not None:
        first = jnp.maximum(first, index - window)
    return jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, first)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _banded(q, k, v, first_key, options):
    return _banded_forward(q, k, v, first_key, options)[0]


def _banded_forward(q, k, v, first_key, options):
    def visit(_, index):
        block = _Block(q, k, first_key, index, options)
        scores, _ = block.scores(q, k)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(block.visible, jnp.exp(scores - largest), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total == 0, 1.0, total)
        values = block.keys_of(v)
        out = einsum_float32("bkcrs,bskh->bckrh", weights.astype(v.dtype), values)
        out = out / jnp.moveaxis(total, 1, 2)
        log_total = (largest + jnp.log(total))[..., 0]
        return None, (out.reshape(block.queries_of(q).shape).astype(q.dtype), log_total)

    blocks = jnp.arange(q.shape[1] // options.block)
    _, (out, log_total) = jax.lax.scan(visit, None, blocks)
    out = _join_blocks(out)
    return out, (q, k, v, first_key, out, log_total)


def _banded_backward(options, residuals, out_cotangent):
    q, k, v, first_key, out, log_total = residuals

    def visit(carry, inputs):
        k_gradient, v_gradient = carry
        index, log_total = inputs
        block = _Block(q, k, first_key, index, options)
        scores, cap_derivative = block.scores(q, k)
        weights = jnp.where(block.visible, jnp.exp(scores - log_total[..., None]), 0.0)
        cotangent = block.grouped(block.queries_of(out_cotangent))
        inner = cotangent.astype(jnp.float32) * block.grouped(
            block.queries_of(out)
        ).astype(jnp.float32)
        inner = jnp.moveaxis(jnp.sum(inner, axis=-1, keepdims=True), 2, 1)
        dv = einsum_float32("bkcrs,bckrh->bskh", weights.astype(v.dtype), cotangent)
        dweights = einsum_float32("bckrh,bskh->bkcrs", cotangent, block.keys_of(v))
        dscores = weights * (dweights - inner) * cap_derivative * options.scale
        dscores = dscores.astype(q.dtype)
        dq = einsum_float32("bkcrs,bskh->bckrh", dscores, block.keys_of(k))
        queries = block.grouped(block.queries_of(q))
        dk = einsum_float32("bkcrs,bckrh->bskh", dscores, queries)
        carry = block.add_to_keys(k_gradient, dk), block.add_to_keys(v_gradient, dv)
        return carry, dq.reshape(block.queries_of(q).shape).astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    blocks = jnp.arange(q.shape[1] // options.block)
    (dk, dv), dq = jax.lax.scan(visit, zeros, (blocks, log_total))
    return _join_blocks(dq), dk.astype(k.dtype), dv.astype(v.dtype), None


_banded.defvjp(_banded_forward, _banded_backward)


class _Block:
    """One block of queries and the slice of keys that it can see."""

    def __init__(self, q, k, first_key, index, options):
        self.options = options
        self.key_heads = k.shape[2]
        self.query_start = index * options.block
        front = k.shape[1] - q.shape[1]
        query_end = front + self.query_start + options.block
        self.key_start = jnp.maximum(query_end - options.span, 0)
        key = self.key_start + jnp.arange(options.span, dtype=jnp.int32)
        query = front + self.query_start + jnp.arange(options.block, dtype=jnp.int32)
        visible = key[None, None, :] <= query[None, :, None]
        visible &= key[None, None, :] >= self.queries_of(first_key)[:, :, None]
        self.visible = visible[:, None, :, None, :]  # [B, 1, C, 1, span]

    def queries_of(self, array):
        return jax.lax.dynamic_slice_in_dim(
            array, self.query_start, self.options.block, axis=1
        )

    def keys_of(self, array):
        return jax.lax.dynamic_slice_in_dim(
            array, self.key_start, self.options.span, axis=1
        )

    def add_to_keys(self, total, gradient):
        return jax.lax.dynamic_update_slice_in_dim(
            total, self.keys_of(total) + gradient, self.key_start, axis=1
        )

    def grouped(self, array):
        """[B, C, N, H] as [B, C, K, N / K, H]."""
        return array.reshape(*array.shape[:2], self.key_heads, -1, array.shape[-1])

    def scores(self, q, k):
        """Masked float32 scores [B, K, C, N / K, span], and the soft cap's derivative."""
        queries, keys = self.grouped(self.queries_of(q)), self.keys_of(k)
        scores = self.options.scale * einsum_float32("bckrh,bskh->bkcrs", queries, keys)
        cap_derivative = 1.0
        if self.options.soft_cap is not None:
            capped = jnp.tanh(scores / self.options.soft_cap)
            cap_derivative = 1.0 - capped * capped
            scores = self.options.soft_cap * capped
        return jnp.where(self.visible, scores, NO_SCORE), cap_derivative


def _join_blocks(blocks):
    """[blocks, B, C, ...] as [B, blocks * C, ...]."""
    blocks = jnp.swapaxes(blocks, 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])
