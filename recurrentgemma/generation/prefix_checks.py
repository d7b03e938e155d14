"""Checks of a cache and a history that a caller has made for a prefix.

Shapes and dtypes must be those that the model makes itself, and the counters must be
ones that reading a text can lead to: what a cache says of positions decides which keys
are seen, and nothing later would notice that it is wrong.
"""

from typing import Any

import jax
import numpy as np

from recurrentgemma._validation import array, refuse
from recurrentgemma.cache import (
    OVERFLOWN,
    Cache,
    max_tokens_held,
    named_leaves,
    refuse_overflown,
)
from recurrentgemma.generation.history import History
from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels.local_attention import KVCache


def check_cache(cache: Cache, model: Griffin) -> None:
    """Raises ValueError unless the model could have made the cache, values aside."""
    rows = cache.batch_size
    expected = named_leaves(
        jax.eval_shape(lambda: model.init_cache(rows, capacity=cache.capacity))
    )
    found = named_leaves(cache)
    for name in sorted(expected.keys() | found.keys()):
        wanted, given = (_form(leaves.get(name)) for leaves in (expected, found))
        if wanted != given:
            raise ValueError(
                f"cache: expected {name} to be {wanted}, got {given}; begin with "
                "model.init_cache and change the values of its leaves"
            )
    for name, leaf in cache.floating().items():
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            refuse("cache", f"finite numbers in {name}", leaf)
    if (max_tokens_held(cache) or 0) >= OVERFLOWN:
        refuse_overflown(cache)
    next_position = np.asarray(cache.next_position)
    if (next_position < 0).any():
        refuse("cache", "a next_position of at least 0", next_position)
    for layer, state in enumerate(cache.layers):
        if isinstance(state, KVCache):
            _check_ring(layer, np.asarray(state.positions), next_position)


def new_history(
    cache: Cache, vocab_size: int, last_token: Any, num_tokens: Any, seen: Any
) -> History:
    """The history of rows that end with a token which the cache has not seen.

    Raises:
      ValueError: as `Prefix.from_cache`.
    """
    rows = cache.batch_size
    last = _integers("last_token", last_token, rows, 0, vocab_size - 1)
    if num_tokens is None:
        num_tokens = np.asarray(cache.next_position) + 1
    count = _integers("num_tokens", num_tokens, rows, 1, np.iinfo(np.int32).max)
    if seen is None:
        seen = np.zeros((rows, vocab_size), bool)
        seen[np.arange(rows), last] = True
    wanted = f"booleans [{rows}, {vocab_size}]"
    found = array("seen", seen, wanted)
    if found.shape != (rows, vocab_size) or found.dtype != bool:
        refuse("seen", wanted, seen)
    return History(last, count, found)


def _form(leaf: Any) -> str:
    return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def _check_ring(layer: int, positions: np.ndarray, next_position: np.ndarray) -> None:
    """The newest keys of a row, without a gap, each in the slot of its position."""
    newest = positions.max(axis=1, keepdims=True)
    slots = positions.shape[1]
    places = newest - (newest - np.arange(slots)) % slots
    count = (positions >= 0).sum(axis=1, keepdims=True)
    legal = np.where(places > newest - count, places, -1)
    ends = (count[:, 0] == 0) | (newest[:, 0] == next_position - 1)
    if (positions != legal).any() or not ends.all():
        raise ValueError(
            f"cache: expected in layers.{layer}.positions the last positions before "
            f"next_position, p in slot p mod {slots}, or -1 in all slots of a row, got "
            f"others; take the counters from a cache that the model returned"
        )


def _integers(name: str, value: Any, rows: int, least: int, most: int) -> np.ndarray:
    """int32 [rows]; one number stands for all rows."""
    wanted = f"{rows} integers from {least} to {most}"
    found = array(name, value, wanted)
    if found.ndim == 0:
        found = np.full(rows, found)
    if (
        found.shape != (rows,)
        or found.dtype.kind not in "iu"
        or ((found < least) | (found > most)).any()
    ):
        refuse(name, wanted, value)
    return found.astype(np.int32)
