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


class RecurrentState(NamedTuple):
    """What a recurrent block carries."""

    h: jax.Array
    """RG-LRU state, float32 [B, E]."""
    conv: jax.Array
    """Last inputs of the convolution, oldest first, zeros before the document's start;
    compute dtype [B, conv_width - 1, E]."""


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
