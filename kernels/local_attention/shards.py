"""Attention on the shards of a sequence: each gets the keys before it, as its cache."""

import jax

from recurrentgemma.kernels import sharded
from recurrentgemma.kernels.local_attention import ring
from recurrentgemma.kernels.local_attention.ring import KVCache


def ring_before(
    cache: KVCache, k: jax.Array, v: jax.Array, positions: jax.Array, axis: str
) -> KVCache:
    """The ring after the tokens before a shard, of which it can hold the last ones.

    Args:
      cache: the ring before the whole sequence; it may be longer than a shard.
      k, v: keys and values of the shard [B, T, K, H].
      positions: int32 [B, T] of the shard.
      axis: the mesh axis.
    """
    length, slots = positions.shape[1], cache.positions.shape[1]
    devices = jax.lax.psum(1, axis)
    reach = min(slots, (devices - 1) * length)
    for distance in range(-(-reach // length), 0, -1):
        tail = slice(-min(length, reach - (distance - 1) * length), None)
        # Who gets nothing gets zeros, which must mean the position of padding.
        cache = ring.write(
            cache,
            sharded.shift(k[:, tail], distance, axis),
            sharded.shift(v[:, tail], distance, axis),
            sharded.shift(positions[:, tail] + 1, distance, axis) - 1,
        )
    return cache
