"""Local attention by jax's splash kernel: for chunks of more than one token on TPU.

Keys are laid out as in `blocked.py`, cached ones in time order and then the chunk, so
that the window is a band known beforehand, of which the kernel visits only the blocks
inside. Documents, empty slots of the cache and padding are segments: a query sees keys
of its own alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from recurrentgemma.kernels.local_attention import ring
from recurrentgemma.kernels.local_attention.ring import KVCache

LANES = 128
HEAD_MULTIPLE = LANES
"""Narrower heads leave part of every register empty."""
LARGEST_BLOCK = 512
"""Queries, and keys, in a block of the kernel."""
BLOCKS = (
    "block_q",
    "block_kv",
    "block_q_dkv",
    "block_kv_dkv",
    "block_q_dq",
    "block_kv_dq",
)
DTYPES = (jnp.float32, jnp.bfloat16)
EMPTY = -1
"""Segment of a slot that holds no token; the documents of a chunk count from 0."""


def supports(
    q: jax.Array, k: jax.Array, v: jax.Array, *_: Any, **__: Any
) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    if q.shape[3] % HEAD_MULTIPLE:
        return f"heads of {q.shape[3]} channels are no multiple of {HEAD_MULTIPLE}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return (
            "it takes float32 or bfloat16, the same for q, k and v, not "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    return None


def attend(*arrays: jax.Array, interpret: bool = False, **options: Any):
    """The output, and the logarithm of the sum of weights; see `blocked.attend`."""
    out, log_total = _attend(*arrays, interpret=interpret, residuals=True, **options)
    return out, log_total


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    held: jax.Array,
    out: jax.Array,
    log_total: jax.Array,
    out_gradient: jax.Array,
    *,
    interpret: bool = False,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """See `blocked.gradients`. The kernel's own derivative computes its output again."""
    del out, log_total

    def run(q, k, v, keys, values):
        arrays = (q, k, v, positions, keys, values, held)
        return _attend(*arrays, interpret=interpret, residuals=False, **options)

    return jax.vjp(run, q, k, v, keys, values)[1](out_gradient)


def _attend(
    q,
    k,
    v,
    positions,
    keys,
    values,
    held,
    *,
    window,
    scale,
    soft_cap,
    interpret,
    residuals,
):
    segments = jnp.cumsum(positions == 0, axis=1, dtype=jnp.int32)
    key_segments = segments
    if held.shape[1]:
        past = ring.chronological(KVCache(keys, values, held))
        k = jnp.concatenate([past.keys.astype(k.dtype), k], axis=1)
        v = jnp.concatenate([past.values.astype(v.dtype), v], axis=1)
        cached = jnp.where(past.positions >= 0, 0, EMPTY)
        key_segments = jnp.concatenate([cached, segments], axis=1)

    _, length, heads, _ = q.shape
    front = held.shape[1]
    block = min(LARGEST_BLOCK, _round_up(length, LANES))
    num_queries = _round_up(length, block)
    num_keys = _round_up(front + num_queries, block)
    multi_query = k.shape[2] == 1
    tables = _prepare(heads, multi_query, (num_queries, num_keys), window, front, block)
    kernel = splash_attention_kernel.SplashAttentionKernel(
        *tables.tree_flatten()[0],
        **{
            **tables.kwargs,
            "attn_logits_soft_cap": soft_cap,
            "save_residuals": residuals,
            "interpret": interpret,
        },
    )
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (
        jnp.swapaxes(_extend(array, size), 1, 2)
        for array, size in ((scaled, num_queries), (k, num_keys), (v, num_keys))
    )
    if multi_query:
        k, v = k[:, 0], v[:, 0]
    # A query that saw no key would divide by zero: padding goes on as the last segment.
    ids = splash_attention_kernel.SegmentIds(
        q=_extend(segments, num_queries, mode="edge"),
        kv=_extend(key_segments, num_keys, mode="edge"),
    )
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q, k, v, ids)
    if residuals:
        out, (log_total,) = out
        out = (out, log_total)
    return jax.tree.map(lambda array: jnp.swapaxes(array, 1, 2)[:, :length], out)


@functools.lru_cache(maxsize=64)
def _prepare(heads, multi_query, shape, window, front, block):
    """The kernel for these numbers of queries and keys, with the default options.

    Its tables of the blocks to visit take seconds of the host where there are many.
    """
    band = splash_attention_mask.LocalMask(shape, (window, 0), front)
    make = (
        splash_attention_kernel.make_splash_mqa_single_device
        if multi_query
        else splash_attention_kernel.make_splash_mha_single_device
    )
    sizes: dict[str, Any] = dict.fromkeys(BLOCKS, block)
    with jax.ensure_compile_time_eval():
        kernel = make(
            splash_attention_mask.MultiHeadMask([band] * heads),
            block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        )
        # On the host, so that it belongs to no device and to no trace.
        return jax.tree.map(jax.device_get, kernel)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _extend(array, size, mode="constant"):
    """Axis 1 made `size` long at its end."""
    more = [(0, 0)] * array.ndim
    more[1] = (0, size - array.shape[1])
    return jnp.pad(array, more, mode=mode)
