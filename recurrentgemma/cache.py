"""What is carried between calls of the model, and operations on its rows.

The cache is what a Griffin model remembers of everything it has read: for a recurrent
layer the state of the RG-LRU and the last inputs of its convolution, for a local
attention layer a ring of the last W keys and values. Its shapes do not depend on how
much that was. Global attention keeps a ring of `capacity` entries instead, which must
not overflow.

`Chunk` describes the tokens of one call as the layers see them: rows padded at their
end alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from recurrentgemma.config import GriffinConfig


class RecurrentState(NamedTuple):
    """What a recurrent block carries."""

    h: jax.Array
    """RG-LRU state, float32 [B, E]."""
    conv: jax.Array
    """Last inputs of the convolution, oldest first, zeros before the document's start;
    compute dtype [B, conv_width - 1, E]."""


class RewindableState(NamedTuple):
    """What a recurrent block carries while its last K tokens may be taken back."""

    h: jax.Array
    """RG-LRU states after each of the last 1 + K tokens, the newest last; float32
    [B, 1 + K, E]."""
    conv: jax.Array
    """Last inputs of the convolution; compute dtype [B, conv_width - 1 + K, E]."""

    def keep_last(self, h: jax.Array, lengths: jax.Array) -> jax.Array:
        """The last 1 + K states after a chunk.

        Args:
          h: float32 [B, T, E], the states after each token of the chunk.
          lengths: int32 [B], tokens of each row.
        """
        states = jnp.concatenate([self.h, h], axis=1)
        steps = jnp.arange(self.h.shape[1], dtype=jnp.int32)[None]
        index = lengths[:, None] + steps
        return jnp.take_along_axis(states, index[..., None], axis=1)


class AttentionState(NamedTuple):
    """What an attention block carries; the token at position p is in slot p mod S."""

    keys: jax.Array
    """Keys after the rotary embedding, compute dtype [B, S, K, H]."""
    values: jax.Array
    """Values, compute dtype [B, S, K, H]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The state of a model after the tokens of each row; a pytree, batch axis first."""

    layers: tuple[Any, ...]
    """The state of each layer's temporal-mixing block."""
    next_position: jax.Array
    """Position of each row's next token in its document, int32 [B]; 0: an empty row."""
    key_positions: jax.Array | None
    """Positions of the entries of the window layers' rings, int32 [B, W]; -1: empty."""
    global_key_positions: jax.Array | None
    """The same for the global layers' rings, int32 [B, capacity]."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.next_position.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of one call as the layers see them."""

    positions: jax.Array
    """int32 [B, T]: position of each token in its document; -1 at padding, which is at
    the end of rows alone."""
    lengths: jax.Array
    """int32 [B]: tokens of each row."""
    next_position: jax.Array
    """int32 [B]: position after the row's last token."""
    rotary: tuple[jax.Array, ...] | None
    """(cos, sin) of the rotary embedding at `positions`; None without attention."""


def take(cache: Cache, rows: Sequence[int] | jax.Array) -> Cache:
    """The cache of the chosen rows, in their order.

    Args:
      cache: any cache.
      rows: int [R], row indices; a row may be taken more than once.

    Returns:
      A cache of R rows.

    Raises:
      ValueError: a row does not exist. (Traced indices are not checked.)
    """
    if not isinstance(rows, jax.core.Tracer):
        known = np.asarray(rows)
        if known.ndim != 1 or np.any((known < 0) | (known >= cache.batch_size)):
            raise ValueError(
                f"rows must be a list of indices from 0 to {cache.batch_size - 1}, "
                f"got {known.tolist()}."
            )
    index = jnp.asarray(rows, jnp.int32)
    return jax.tree.map(lambda leaf: leaf[index], cache)


def repeat(cache: Cache, count: int) -> Cache:
    """Every row `count` times, copies of a row side by side.

    Raises:
      ValueError: count is less than 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), cache)


def concatenate(caches: Sequence[Cache]) -> Cache:
    """The rows of several caches of one model, in order.

    Raises:
      ValueError: no caches were given, or their structure or row shapes differ.
    """
    if not caches:
        raise ValueError("caches must hold at least one cache.")
    for i, cache in enumerate(caches):
        if _row_shapes(cache) != _row_shapes(caches[0]):
            raise ValueError(
                f"caches[{i}] does not fit caches[0]: they come from different models, "
                "compute dtypes or capacities."
            )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *caches)


def _row_shapes(cache: Cache):
    leaves, structure = jax.tree.flatten(cache)
    return structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]


def grow(cache: Cache, config: GriffinConfig, capacity: int) -> Cache:
    """The cache with room for `capacity` tokens in its global layers.

    Args:
      cache: any cache.
      config: of its model.
      capacity: new number of slots, not less than a row's tokens. A model without
        global attention needs none; its cache comes back as it is.
    """
    if cache.global_key_positions is None:
        return cache
    index, positions = _relay(cache.global_key_positions, capacity)
    layers = tuple(
        _take_slots(state, index) if kind == "global_attention" else state
        for kind, state in zip(config.block_types, cache.layers, strict=True)
    )
    return dataclasses.replace(cache, layers=layers, global_key_positions=positions)


def make_rewindable(cache: Cache, config: GriffinConfig, count: int) -> Cache:
    """The same cache, which also keeps what `rewind` needs to go back `count` tokens.

    The model takes and returns it like any other. 0 makes it a plain cache again.

    Args:
      cache: a cache, rewindable or not.
      config: of its model.
      count: K, most tokens to take back.

    Raises:
      ValueError: a block type of the model cannot be rewound.
    """
    known = {"recurrent", "local_attention", "global_attention"}
    if not known.issuperset(config.block_types):
        raise ValueError(
            "Tokens cannot be taken back from a model with "
            f"{', '.join(sorted(set(config.block_types) - known))} blocks."
        )
    index = positions = None
    if cache.key_positions is not None:
        slots = config.attention_window + count
        index, positions = _relay(cache.key_positions, slots)

    def keep(kind, state):
        if kind == "global_attention":
            return state
        if kind == "local_attention":
            return _take_slots(state, index)
        h = state.h if isinstance(state, RewindableState) else state.h[:, None]
        conv = _keep_newest(state.conv, config.conv_width - 1 + count)
        if count == 0:
            return RecurrentState(h[:, -1], conv)
        return RewindableState(_keep_newest(h, 1 + count), conv)

    layers = tuple(
        keep(kind, state)
        for kind, state in zip(config.block_types, cache.layers, strict=True)
    )
    return dataclasses.replace(cache, layers=layers, key_positions=positions)


def rewind(cache: Cache, counts: jax.Array) -> Cache:
    """The cache before the last `counts` tokens of each row.

    Args:
      cache: from `make_rewindable`, or what the model made of it.
      counts: int32 [B], each at most K, of tokens read since and of one document.
    """
    next_position = cache.next_position - counts

    def forget(positions):
        if positions is None:
            return None
        return jnp.where(positions < next_position[:, None], positions, -1)

    def back(states):
        """The oldest ones fill up what is missing: they are too old to matter."""
        steps = jnp.arange(states.shape[1], dtype=jnp.int32)[None]
        index = jnp.maximum(steps - counts[:, None], 0)
        return jnp.take_along_axis(states, index[..., None], axis=1)

    return Cache(
        layers=tuple(
            RewindableState(back(state.h), back(state.conv))
            if isinstance(state, RewindableState)
            else state
            for state in cache.layers
        ),
        next_position=next_position,
        key_positions=forget(cache.key_positions),
        global_key_positions=forget(cache.global_key_positions),
    )


def _keep_newest(states: jax.Array, size: int) -> jax.Array:
    """[B, S, E] -> [B, size, E]: the last ones, zeros before them."""
    states = jnp.pad(states, ((0, 0), (max(size - states.shape[1], 0), 0), (0, 0)))
    return states[:, states.shape[1] - size :]


def _relay(positions: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Where a ring of another size finds its entries, and their positions.

    Args:
      positions: int32 [B, S], of the entries of a ring of S slots.
      slots: R, size of the new one.

    Returns:
      int32 [B, R], slots of the old ring, and int32 [B, R], positions in the new one.
    """
    newest = jnp.max(positions, axis=1, keepdims=True)
    wanted = newest - (newest - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    index = wanted % positions.shape[1]
    held = jnp.take_along_axis(positions, index, axis=1) == wanted
    return index, jnp.where(held & (wanted >= 0), wanted, -1)


def _take_slots(state: AttentionState, index: jax.Array | None) -> AttentionState:
    assert index is not None, "a layer has a ring that the cache has no positions for"
    rows = index[..., None, None]
    return AttentionState(*(jnp.take_along_axis(ring, rows, axis=1) for ring in state))


def check_positions(positions: np.ndarray, next_position: np.ndarray | None = None):
    """Checks on the host that positions are legal.

    Args:
      positions: int [B, T].
      next_position: int [B], `Cache.next_position` of the rows; None is all 0.

    Raises:
      ValueError: naming the first position of a row that is not -1 (padding), 0 (a new
        document), the previous one + 1, or any start on an empty row.
    """
    positions = np.asarray(positions)
    if positions.ndim != 2 or not np.issubdtype(positions.dtype, np.integer):
        raise ValueError(
            f"positions must be integers [B, T], got {positions.dtype} "
            f"{positions.shape}."
        )
    expected = np.zeros(len(positions), int)
    if next_position is not None:
        expected = np.asarray(next_position)
    for t, position in enumerate(positions.T):
        legal = (position == -1) | (position == 0) | (position == expected)
        legal |= (expected == 0) & (position > 0)
        if not legal.all():
            row = int(np.argmin(legal))
            raise ValueError(
                f"positions[{row}, {t}] is {position[row]}; expected -1 (padding), 0 "
                f"(a new document) or {expected[row]} (the next of its document)."
            )
        expected = np.where(position >= 0, position + 1, expected)
