"""The ring of cached keys and values: the token at position p lies in slot p mod S."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """The last S tokens of each row's current document.

    Attributes:
      keys: [B, S, K, H].
      values: [B, S, K, H].
      positions: int32 [B, S], the position of the token in each slot; -1 is empty.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array


def chronological(cache: KVCache) -> KVCache:
    """Orders every row by time: the row's last token comes last, empty slots first.

    Holds as long as a row's tokens are consecutive and end at its largest position.
    """
    slots = cache.positions.shape[1]
    next_position = jnp.max(cache.positions, axis=1, keepdims=True) + 1
    order = (next_position + jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    return KVCache(*(_take_rows(array, order) for array in cache))


def empty(keys: jax.Array, values: jax.Array, slots: int) -> KVCache:
    """A cache without tokens, for keys and values like these [B, T, K, H]."""
    batch, _, *rest = keys.shape
    shape = (batch, slots, *rest)
    return KVCache(
        jnp.zeros(shape, keys.dtype),
        jnp.zeros(shape, values.dtype),
        jnp.full(shape[:2], -1, jnp.int32),
    )


def write(
    cache: KVCache, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> KVCache:
    """The cache after a chunk of right-padded rows; see `local_attention`.

    Only the row's last document stays.
    """
    if positions.shape[1] == 1:
        return _write_one(cache, keys, values, positions)
    slots = cache.positions.shape[1]
    length = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)[:, None]
    newest = jnp.max(
        jnp.where(_column_index(positions) == length - 1, positions, -1),
        axis=1,
        keepdims=True,
    )
    # Slot s belongs to the token `age` before the newest one.
    age = (newest - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    from_chunk = age < length
    source = jnp.maximum(length - 1 - age, 0)
    # Positions count within a document, so a token of an earlier one would be negative.
    chunk_positions = jnp.maximum(newest - age, -1)
    restarted = jnp.any(positions == 0, axis=1, keepdims=True)
    kept_positions = jnp.where(restarted, -1, cache.positions)

    def merge(new, old):
        taken = _take_rows(new.astype(old.dtype), source)
        return jnp.where(from_chunk[:, :, None, None], taken, old)

    return KVCache(
        merge(keys, cache.keys),
        merge(values, cache.values),
        jnp.where(from_chunk, chunk_positions, kept_positions),
    )


def write_in_place(
    cache: KVCache, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> KVCache:
    """`write` as a scatter, which XLA does in place on a donated ring.

    Its time is that of the chunk, while `write` is a pass over the whole ring.
    """
    slots = cache.positions.shape[1]
    index = _column_index(positions)
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)[:, None]
    is_last = index == count - 1
    newest = jnp.max(jnp.where(is_last, positions, -1), axis=1, keepdims=True)
    age = newest - positions
    # An earlier document's position is not the place before the last token.
    stays = (positions >= 0) & (age == count - 1 - index) & (age < slots)
    slot = jnp.where(stays, positions % slots, slots)
    rows = jnp.arange(positions.shape[0])[:, None]
    restarted = jnp.any(positions == 0, axis=1, keepdims=True)

    def put(old, new):
        return old.at[rows, slot].set(new.astype(old.dtype), mode="drop")

    return KVCache(
        put(cache.keys, keys),
        put(cache.values, values),
        put(jnp.where(restarted, -1, cache.positions), positions),
    )


def after(out: jax.Array, positions: jax.Array) -> jax.Array:
    """The same positions, but known only when the attention output is.

    XLA orders by data alone: without this it copies a ring that is read and then
    written, twice a call, instead of writing in place. (An optimization barrier
    is gone before it decides.)

    Args:
      out: [B, T, N, H].
      positions: int32 [B, T].
    """
    first = out[:, :, 0, 0]
    never = jnp.isnan(first) & (first > 0)
    return positions + never.astype(positions.dtype)


def _write_one(cache, keys, values, positions):
    """One token a row: a scatter, which XLA does in place on a donated cache."""
    slots = cache.positions.shape[1]
    rows = jnp.arange(positions.shape[0])
    position = positions[:, 0]
    slot = jnp.where(position < 0, slots, position % slots)
    restarted = positions == 0

    def put(old, new):
        return old.at[rows, slot].set(new.astype(old.dtype), mode="drop")

    return KVCache(
        put(cache.keys, keys[:, 0]),
        put(cache.values, values[:, 0]),
        put(jnp.where(restarted, -1, cache.positions), position),
    )


def _column_index(array):
    return jnp.arange(array.shape[1], dtype=jnp.int32)[None]


def _take_rows(array, index):
    """array[b, index[b, i]] for index [B, I]."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode="clip"))(array, index)
