"""Local attention by jax's splash kernel: for chunks of more than one token on TPU.

Keys are laid out as in `blocked.py`, cached ones in time order and then the chunk, so
that the window is a band known beforehand, of which the kernel visits only the blocks
inside. Documents, empty slots of the cache and padding are segments: a query sees keys
of its own alone.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from recurrentgemma.kernels.dispatch import differentiable
from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings, keys_in_time
from recurrentgemma.kernels.precision import kernel_precision_of

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
BACKWARD_OPTIONS = (
    "mask_value",
    "is_mqa",
    "block_sizes",
    "residual_checkpoint_name",
    "mask_function",
)
"""Options of the kernel that its gradient takes, in this order."""
DTYPES = (jnp.float32, jnp.bfloat16)
EMPTY = -1
"""Segment of a slot that holds no token; the documents of a chunk count from 0."""


def supports(chunk: Chunk, *, settings: Settings) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    del settings
    q, k, v, *_ = chunk
    if q.shape[3] % HEAD_MULTIPLE:
        return f"heads of {q.shape[3]} channels are no multiple of {HEAD_MULTIPLE}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return (
            "it takes float32 or bfloat16, the same for q, k and v, not "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    return None


def attend(
    chunk: Chunk, *, settings: Settings, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `reference.attend`."""
    layout = _Layout.of(chunk, settings)
    tables = _prepare(layout)
    kernel = splash_attention_kernel.SplashAttentionKernel(
        *tables.tree_flatten()[0],
        **{
            **tables.kwargs,
            "attn_logits_soft_cap": settings.soft_cap,
            "save_residuals": True,
            "interpret": interpret,
        },
    )
    arrays = *_arrange(chunk, layout, settings.scale), _segments(chunk, layout)
    with _precision(chunk.q):
        out, (log_total,) = jax.vmap(
            lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids)
        )(*arrays)
    length = chunk.q.shape[1]
    return tuple(jnp.swapaxes(array, 1, 2)[:, :length] for array in (out, log_total))


def gradients(
    arguments: tuple[Chunk],
    results: tuple[jax.Array, jax.Array],
    upstream: tuple[jax.Array, jax.Array],
    *,
    settings: Settings,
    interpret: bool = False,
) -> tuple[Chunk]:
    """See `blocked.gradients`.

    jax offers the kernels of the gradient through `jax.vjp` alone, which would compute
    the output again. The function behind it takes results that are there already; it is
    not public, and has had these arguments from jax 0.7.2 to 0.10.2 at least.
    """
    (chunk,) = arguments
    layout = _Layout.of(chunk, settings)
    arrange = functools.partial(_arrange, layout=layout, scale=settings.scale)
    arrays, pull_back = jax.vjp(arrange, chunk)
    tables = _prepare(layout)
    # The queries appended at the end have an output gradient of 0: they add nothing.
    of_queries = (
        jnp.swapaxes(_extend(array, layout.num_queries), 1, 2)
        for array in (*results, upstream[0])
    )

    def row(q, k, v, ids, out, log_total, out_gradient):
        residuals = (
            *(q, k, v, ids, None, out, log_total),
            *(tables.dq_mask_info, tables.dkv_mask_info),
        )
        return splash_attention_kernel._splash_attention_bwd(
            False,
            *(tables.kwargs[name] for name in BACKWARD_OPTIONS),
            settings.soft_cap,
            interpret,
            residuals,
            out_gradient,
        )[3:6]

    with _precision(chunk.q):
        of_arrays = jax.vmap(row)(*arrays, _segments(chunk, layout), *of_queries)
    return differentiable(pull_back(of_arrays))


class _Layout(NamedTuple):
    """How queries and keys lie in the kernel."""

    heads: int
    multi_query: bool
    num_queries: int
    num_keys: int
    window: int | None
    front: int
    """Cached keys before those of the chunk."""
    block: int

    @classmethod
    def of(cls, chunk: Chunk, settings: Settings) -> "_Layout":
        _, length, heads, _ = chunk.q.shape
        front = chunk.cache.positions.shape[1]
        block = min(LARGEST_BLOCK, _round_up(length, LANES))
        queries = _round_up(length, block)
        keys = _round_up(front + queries, block)
        multi_query = chunk.k.shape[2] == 1
        return cls(heads, multi_query, queries, keys, settings.window, front, block)


def _arrange(chunk, layout, scale):
    """Scaled queries [B, N, T, H]; keys and values [B, K, S, H] in time, or [B, S, H]."""
    q = (chunk.q.astype(jnp.float32) * scale).astype(chunk.q.dtype)
    sizes = (layout.num_queries, layout.num_keys, layout.num_keys)
    q, k, v = (
        jnp.swapaxes(_extend(array, size), 1, 2)
        for array, size in zip((q, *keys_in_time(chunk)), sizes, strict=True)
    )
    return (q, k[:, 0], v[:, 0]) if layout.multi_query else (q, k, v)


def _segments(chunk, layout) -> splash_attention_kernel.SegmentIds:
    """Documents of the queries and of the keys; those of the cache come before 1."""
    segments = jnp.cumsum(chunk.positions == 0, axis=1, dtype=jnp.int32)
    # Cached keys lie in time order: the empty slots come first.
    held = chunk.cache.positions >= 0
    filled = jnp.sum(held, axis=1, keepdims=True, dtype=jnp.int32)
    slot = jnp.arange(layout.front, dtype=jnp.int32)[None]
    cached = jnp.where(slot >= layout.front - filled, 0, EMPTY)
    keys = jnp.concatenate([cached, segments], axis=1)
    # A query that saw no key would divide by zero: padding goes on as the last segment.
    return splash_attention_kernel.SegmentIds(
        q=_extend(segments, layout.num_queries, mode="edge"),
        kv=_extend(keys, layout.num_keys, mode="edge"),
    )


def _precision(q: jax.Array):
    """What the kernels' products take; they name no precision themselves."""
    return jax.default_matmul_precision(kernel_precision_of(q).name.lower())


@functools.lru_cache(maxsize=64)
def _prepare(layout):
    """The kernel for this layout, with the default options.

    Its tables of the blocks to visit take seconds of the host where there are many.
    """
    band = splash_attention_mask.LocalMask(
        (layout.num_queries, layout.num_keys), (layout.window, 0), layout.front
    )
    make = (
        splash_attention_kernel.make_splash_mqa_single_device
        if layout.multi_query
        else splash_attention_kernel.make_splash_mha_single_device
    )
    sizes: dict[str, Any] = dict.fromkeys(BLOCKS, layout.block)
    with jax.ensure_compile_time_eval():
        kernel = make(
            splash_attention_mask.MultiHeadMask([band] * layout.heads),
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
