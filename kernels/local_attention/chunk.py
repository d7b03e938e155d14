"""What implementations of local attention get: a chunk, and settings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.local_attention import ring
from recurrentgemma.kernels.local_attention.ring import KVCache


class Chunk(NamedTuple):
    """The arrays of `local_attention`, or their gradients: None for positions."""

    q: Any
    k: Any
    v: Any
    positions: Any
    cache: KVCache
    """The one before the chunk, with 0 slots if there is none."""


class Settings(NamedTuple):
    """The numbers of `local_attention`."""

    window: int | None
    scale: float
    soft_cap: float | None


def keys_in_time(chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, S + T, K, H], those of the cache first, in time order."""
    if not chunk.cache.positions.shape[1]:
        return chunk.k, chunk.v
    past = ring.chronological(chunk.cache)
    return (
        jnp.concatenate([past.keys.astype(chunk.k.dtype), chunk.k], axis=1),
        jnp.concatenate([past.values.astype(chunk.v.dtype), chunk.v], axis=1),
    )
