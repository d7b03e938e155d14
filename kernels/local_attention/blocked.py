"""Local attention in blocks of queries: time and memory linear in T, both directions.

The keys are laid out in time order, cache first, so that what a query sees is one
contiguous range of them: from the start of its document, of the cached tokens or of its
window, whichever is latest, to itself. A block of C queries then needs window + C keys,
a slice. The query heads that share a key head are rows of one matrix product. On GPU
blocks are larger: the fewer the steps of the loop, the less it waits.

The backward pass is FlashAttention-2's (arXiv 2307.08691): it recomputes each block's
weights from the logarithm of their sum and adds the slice's gradients in place. One
query (decode) is in `one_query.py`.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import differentiable
from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings, keys_in_time
from recurrentgemma.kernels.local_attention.reference import HIDDEN
from recurrentgemma.kernels.precision import einsum_float32

SMALLEST_BLOCK = 64
LARGEST_BLOCK = 256
BLOCKS_PER_WINDOW = 16
"""Measured on CPU: of what a window of 16 blocks computes, a seventeenth is masked."""
GPU_BLOCK = 512
"""Queries of a block on GPU, at most: 16 steps for 8192 tokens."""
GPU_SCORES = 1 << 26
"""Scores of a block on GPU, at most, of all rows and heads: 256 MiB in float32."""

GROWING_GROUPS = 2
"""Blocks that see all keys so far are grouped; a group's keys are its last block's."""


class _Options(NamedTuple):
    rows: int  # Rows (queries times heads of a group) in a block.
    # Of each group of blocks: its first block, the one after its last, and the number
    # of keys that each of its blocks attends to.
    groups: tuple[tuple[int, int, int], ...]
    # Index after the last key that block i sees is front + (i + 1) * queries.
    front: int
    queries: int
    settings: Settings


def attend(chunk: Chunk, *, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """See `reference.attend`."""
    return _in_blocks(_attend, settings, chunk)


def gradients(
    arguments: tuple[Chunk],
    results: tuple[jax.Array, jax.Array],
    upstream: tuple[jax.Array, jax.Array],
    *,
    settings: Settings,
) -> tuple[Chunk]:
    """See `Implementation.gradient`; that of the sum of weights, unused, is zero."""
    (chunk,), (out, log_total), (out_gradient, _) = arguments, results, upstream
    found = _in_blocks(_gradients, settings, chunk, out, log_total, out_gradient)
    return (found,)


def _in_blocks(function, settings, chunk, *arrays):
    """Runs a function of these arguments with the platform's number of queries a block."""
    length, front = chunk.q.shape[1], chunk.cache.positions.shape[1]
    block = block_size(length, settings.window)
    rows = chunk.q.shape[0] * chunk.q.shape[2]
    large = gpu_block_size(length, front, settings.window, rows, least=block)
    run = partial(function, settings, block)
    if large == block:
        return run(chunk, *arrays)
    on_gpu = partial(function, settings, large)
    return jax.lax.platform_dependent(
        chunk, *arrays, cuda=on_gpu, rocm=on_gpu, default=run
    )


def _attend(settings, block, chunk):
    first, last, options = _plan(chunk, settings, block)
    rows, keys, values = _arrange(chunk, options)
    out, log_total = _attend_rows(rows, keys, values, first, last, options)
    out, log_total = (_from_rows(part, chunk.q.shape) for part in (out, log_total))
    return out, log_total[..., 0]


def _gradients(settings, block, chunk, out, log_total, out_gradient):
    first, last, options = _plan(chunk, settings, block)
    arranged, pull_back = jax.vjp(partial(_arrange, options=options), chunk)
    inner = out.astype(jnp.float32) * out_gradient.astype(jnp.float32)
    log_rows, inner_rows, gradient_rows = (
        _to_rows(array, chunk.k.shape[2], options)
        for array in (
            log_total[..., None],
            jnp.sum(inner, axis=-1, keepdims=True),
            out_gradient,
        )
    )
    of_arranged = _row_gradients(
        arranged, first, last, log_rows, inner_rows, gradient_rows, options
    )
    (found,) = differentiable(pull_back(of_arranged))
    return found


def _plan(chunk, settings, block):
    """First and last key of each row of queries, and how the blocks lie."""
    _, length, heads, _ = chunk.q.shape
    held, window = chunk.cache.positions, settings.window
    front, per_group = held.shape[1], heads // chunk.k.shape[2]
    cached = jnp.sum(held >= 0, axis=1, dtype=jnp.int32)
    first, last = (
        jnp.repeat(jnp.pad(index, ((0, 0), (0, -length % block))), per_group, axis=1)
        for index in visible_range(chunk.positions, cached, front, window)
    )
    groups = _group_blocks(-(-length // block), block, front, window)
    return first, last, _Options(block * per_group, groups, front, block, settings)


def _arrange(chunk, options):
    """Rows of queries [B, K, T N/K, H], and keys and values [B, K, S, H] in time."""
    rows = _to_rows(chunk.q, chunk.k.shape[2], options)
    more = -chunk.q.shape[1] % options.queries
    k, v = (
        jnp.swapaxes(jnp.pad(array, ((0, 0), (0, more), (0, 0), (0, 0))), 1, 2)
        for array in keys_in_time(chunk)
    )
    return rows, k, v


def _to_rows(array, key_heads, options):
    """[B, T, N, H] as [B, K, T N/K, H], T filled up to whole blocks by zeros."""
    batch, length, heads, size = array.shape
    more = -length % options.queries
    array = jnp.pad(array, ((0, 0), (0, more), (0, 0), (0, 0)))
    array = array.reshape(batch, -1, key_heads, heads // key_heads, size)
    return jnp.moveaxis(array, 2, 1).reshape(batch, key_heads, -1, size)


def _from_rows(rows, shape):
    """The inverse of `_to_rows`, for queries of this shape."""
    batch, length, heads, _ = shape
    key_heads, size = rows.shape[1], rows.shape[3]
    array = rows.reshape(batch, key_heads, -1, heads // key_heads, size)
    return jnp.moveaxis(array, 1, 2).reshape(batch, -1, heads, size)[:, :length]


def block_size(length: int, window: int | None) -> int:
    """Queries a block: a multiple of 8 unless one block takes the whole chunk."""
    block = LARGEST_BLOCK
    if window is not None:
        block = -(-window // BLOCKS_PER_WINDOW // 8) * 8
        block = min(max(block, SMALLEST_BLOCK), LARGEST_BLOCK)
    return min(block, length)


def gpu_block_size(
    length: int, front: int, window: int | None, rows: int, *, least: int
) -> int:
    """Queries a block on GPU: as many as `GPU_BLOCK` and `GPU_SCORES` allow.

    Args:
      length: tokens of the chunk.
      front: slots of the cache before it.
      window: past keys that a query sees; None is all.
      rows: rows of the batch times query heads.
      least: queries a block elsewhere.
    """
    block = min(GPU_BLOCK, length)
    keys = front + length
    while block > least:
        span = keys if window is None else min(window + block, keys)
        if rows * block * span <= GPU_SCORES:
            return block
        block //= 2
    return least


def visible_range(positions, cached, front, window):
    """Indices of the first and the last key that each query sees, int32 [B, T].

    Keys are [front cached ones, of which the last `cached` are filled; chunk]. Padding
    comes last in a row: no query sees it but padding itself.
    """
    index = front + jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
    document = jax.lax.cummax(jnp.where(positions == 0, index, 0), axis=1)
    first = jnp.maximum(document, (front - cached)[:, None])
    if window is not None:
        first = jnp.maximum(first, index - window)
    return first, jnp.broadcast_to(index, first.shape)


def _group_blocks(blocks, block, front, window):
    keys = front + blocks * block
    span = keys if window is None else min(window + block, keys)
    growing = max(min((span - front) // block, blocks), 0)
    if growing == 1:
        growing = 0
    bounds = sorted({growing * i // GROWING_GROUPS for i in range(GROWING_GROUPS + 1)})
    groups = [
        (start, stop, front + stop * block)
        for start, stop in itertools.pairwise(bounds)
    ]
    return (*groups, (growing, blocks, span)) if growing < blocks else tuple(groups)


def _attend_rows(q, k, v, first, last, options):
    """Attention of rows [B, K, T N/K, H] to keys [B, K, S, H], each row to a range."""

    def visit(span, _, index):
        rows = partial(_rows, index=index, size=options.rows)
        start = _key_start(index, span, options)
        keys, values = _keys(k, start, span), _keys(v, start, span)
        scores, _ = _scores(rows(q), keys, rows(first), rows(last), start, options)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = einsum_float32("bkms,bksh->bkmh", weights.astype(v.dtype), values)
        return None, ((out / total).astype(q.dtype), largest + jnp.log(total))

    parts = [
        jax.lax.scan(partial(visit, span), None, jnp.arange(start, stop))[1]
        for start, stop, span in options.groups
    ]
    out, log_total = (_join_blocks(blocks) for blocks in zip(*parts, strict=True))
    return out, log_total


def _row_gradients(arrays, first, last, log_total, inner, out_cotangent, options):
    """Gradients of q, k and v of `_attend_rows`; inner is out times its cotangent."""
    q, k, v = arrays

    def visit(span, carry, index):
        dk, dv = carry
        rows = partial(_rows, index=index, size=options.rows)
        start = _key_start(index, span, options)
        keys, values = _keys(k, start, span), _keys(v, start, span)
        scores, cap_derivative = _scores(
            rows(q), keys, rows(first), rows(last), start, options
        )
        weights = jnp.exp(scores - rows(log_total))
        cotangent = rows(out_cotangent)
        dweights = einsum_float32("bkmh,bksh->bkms", cotangent, values)
        dscores = (
            weights * (dweights - rows(inner)) * cap_derivative * options.settings.scale
        )
        dscores = dscores.astype(q.dtype)
        dq = einsum_float32("bkms,bksh->bkmh", dscores, keys)
        # The row block is transposed rather than the larger weights.
        dv_block = einsum_float32("bkmh,bkms->bkhs", cotangent, weights.astype(v.dtype))
        dk_block = einsum_float32("bkmh,bkms->bkhs", rows(q), dscores)
        dk = _add_keys(dk, jnp.swapaxes(dk_block, 2, 3), start)
        dv = _add_keys(dv, jnp.swapaxes(dv_block, 2, 3), start)
        return (dk, dv), dq.astype(q.dtype)

    carry = jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    parts = []
    for start, stop, span in options.groups:
        blocks = jnp.arange(start, stop)
        carry, dq = jax.lax.scan(partial(visit, span), carry, blocks)
        parts.append(dq)
    dk, dv = carry
    return _join_blocks(parts), dk.astype(k.dtype), dv.astype(v.dtype)


def _scores(queries, keys, first, last, start, options):
    """Scores [B, K, rows, span], float32, and the derivative of the soft cap."""
    scores = options.settings.scale * einsum_float32("bkmh,bksh->bkms", queries, keys)
    cap_derivative = 1.0
    if options.settings.soft_cap is not None:
        capped = jnp.tanh(scores / options.settings.soft_cap)
        cap_derivative = 1.0 - capped * capped
        scores = options.settings.soft_cap * capped
    key = start + jnp.arange(keys.shape[2], dtype=jnp.int32)[None, None]
    visible = (key >= first[:, :, None]) & (key <= last[:, :, None])
    return jnp.where(visible[:, None], scores, HIDDEN), cap_derivative


def _key_start(index, span, options):
    return jnp.maximum(options.front + (index + 1) * options.queries - span, 0)


def _rows(array, index, size):
    """Block `index` of the rows, which are axis 1 of [B, rows], else axis 2."""
    axis = min(array.ndim - 1, 2)
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)


def _keys(array, start, span):
    return jax.lax.dynamic_slice_in_dim(array, start, span, axis=2)


def _add_keys(total, addend, start):
    addend += _keys(total, start, addend.shape[2])
    return jax.lax.dynamic_update_slice_in_dim(total, addend, start, axis=2)


def _join_blocks(parts):
    """Arrays [blocks, B, K, rows, H] as one [B, K, all rows, H]."""
    blocks = jnp.moveaxis(jnp.concatenate(parts, axis=0), 0, 2)
    return blocks.reshape(*blocks.shape[:2], -1, blocks.shape[-1])
