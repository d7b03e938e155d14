"""Local attention by cuDNN, through `jax.nn.dot_product_attention`: for GPU, by name.

cuDNN masks by place: a query sees its own key and `window` before it. That is the
window of a row that is one document without a cache. What the other cases need is not
among its arguments: cached keys before the chunk (its causal mask begins at the first
key), the soft cap, and documents that start inside a row. The last depends on values,
and is decided where the program runs: rows of several documents take the blocked form.
Padding comes last in a row, where no other query sees it.

The log of the sum of weights is not asked of cuDNN: jax gives it in the dtype of the
output, where it has it at all, and cuDNN's gradient computes it again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.gpu import capability
from recurrentgemma.kernels.local_attention import blocked
from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings
from recurrentgemma.kernels.local_attention.ring import KVCache

IMPLEMENTATION, EMULATION = "cudnn", "xla"
"""Of jax's function: on a GPU, and where that is interpreted."""
HEAD_MULTIPLE = 8
DTYPES = (jnp.bfloat16, jnp.float16)
LARGEST_HEAD, LARGEST_HEAD_FROM_HOPPER = 128, 256
HOPPER = (9, 0)


def supports(chunk: Chunk, *, settings: Settings) -> str | None:
    """Why cuDNN cannot take these arguments, or None."""
    q, k, v, *_ = chunk
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return (
            "it takes bfloat16 or float16, the same for q, k and v, not "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    if settings.soft_cap is not None:
        return "it has no soft cap"
    if chunk.cache.positions.shape[1]:
        return "it takes no cache: its window is counted from the first key"
    version = capability()
    if version is None:
        return "jax asks the NVIDIA GPU for cuDNN's version, and there is none here"
    largest = LARGEST_HEAD_FROM_HOPPER if version >= HOPPER else LARGEST_HEAD
    size = q.shape[3]
    if size % HEAD_MULTIPLE or size > largest:
        return (
            f"heads must be a multiple of {HEAD_MULTIPLE} channels, at most {largest} "
            f"on this GPU, not {size}"
        )
    return None


def attend(
    chunk: Chunk, *, settings: Settings, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `reference.attend`; the log of the sum is 0 where cuDNN has run."""

    def alone(chunk):
        out = _attend(chunk.q, chunk.k, chunk.v, settings, interpret)
        return out, jnp.zeros(out.shape[:3], jnp.float32)

    several = partial(blocked.attend, settings=settings)
    return jax.lax.cond(restarts(chunk.positions), several, alone, chunk)


def gradients(
    arguments: tuple[Chunk],
    results: tuple[jax.Array, jax.Array],
    upstream: tuple[jax.Array, jax.Array],
    *,
    settings: Settings,
    interpret: bool = False,
) -> tuple[Chunk]:
    """See `blocked.gradients`."""

    def alone(chunk, results, upstream):
        del results
        run = partial(_attend, settings=settings, interpret=interpret)
        _, pull_back = jax.vjp(run, chunk.q, chunk.k, chunk.v)
        none = jax.tree.map(jnp.zeros_like, chunk.cache[:2])
        return (*pull_back(upstream[0]), *none)

    def several(chunk, results, upstream):
        (found,) = blocked.gradients((chunk,), results, upstream, settings=settings)
        return (*found[:3], *found.cache[:2])

    (chunk,) = arguments
    *of_chunk, of_keys, of_values = jax.lax.cond(
        restarts(chunk.positions), several, alone, chunk, results, upstream
    )
    return (Chunk(*of_chunk, None, KVCache(of_keys, of_values, None)),)


def restarts(positions: jax.Array) -> jax.Array:
    """Whether a document starts inside a row of positions [B, T]."""
    return jnp.any(positions[:, 1:] == 0)


def _attend(q, k, v, settings: Settings, interpret: bool) -> Any:
    window = None if settings.window is None else (settings.window, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=settings.scale,
        # Without this, cuDNN would look ahead.
        is_causal=True,
        local_window_size=window,
        implementation=EMULATION if interpret else IMPLEMENTATION,
    )
