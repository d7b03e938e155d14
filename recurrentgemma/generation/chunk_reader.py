"""Rows of tokens into a cache, chunk by chunk, in programs that no new length compiles.

A batch of rows is read to its longest one, shorter rows padded.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.generation.programs import (
    CHUNK_SIZES,
    new_cache,
    plan_chunks,
    read_chunk,
    score_chunk,
)
from recurrentgemma.griffin import Griffin

MIN_CAPACITY = 128
"""Least size of a global-attention cache; others are this times a power of two."""
Progress = Callable[[int, int | None], None]
"""Called while a text is read: with the number of tokens read so far, and of all tokens
of the longest row or None if that is not known."""
Rows = Sequence[Sequence[int]]
"""Token ids of each row."""


class TokenScores(NamedTuple):
    """Scores of consecutive tokens of a row.

    Attributes:
      log_probs: Log-probability of each token, float32 [T], natural logarithm.
      is_best: Whether each token is the most probable one, bool [T].
    """

    log_probs: np.ndarray
    is_best: np.ndarray


class ChunkReader:
    """A model that reads rows of tokens into caches, chunk by chunk."""

    def __init__(self, model: Griffin, *, compile_ahead: bool = False):
        """Compiles nothing yet; without `compile_ahead`, `compile_rest` never does."""
        self.model = model
        self._compile_ahead = compile_ahead
        # Caches without arrays by batch size and capacity; programs by chunk size too.
        self._caches: dict[tuple, Cache] = {}
        self._compiled: dict[tuple, threading.Event] = {}

    def new_cache(self, batch_size: int, num_tokens: int) -> Cache:
        """An empty cache with room for so many tokens in each row."""
        capacity = self._capacity_for(num_tokens)
        return new_cache(self.model, batch_size=batch_size, capacity=capacity)

    def make_room(self, cache: Cache, num_tokens: int) -> Cache:
        """The cache, its global layers grown to hold so many tokens if they cannot."""
        capacity = self._capacity_for(num_tokens)
        if capacity is None or capacity <= (cache.capacity or 0):
            return cache
        return cache_lib.grow(cache, self.model.config, capacity)

    def same_room(self, caches: Sequence[Cache]) -> list[Cache]:
        """The caches, their global layers grown to the largest of them."""
        capacity = max(cache.capacity or 0 for cache in caches)
        return [
            cache_lib.grow(cache, self.model.config, capacity)
            if (cache.capacity or 0) < capacity
            else cache
            for cache in caches
        ]

    def read(self, cache: Cache, rows: Rows, progress: Progress | None = None) -> Cache:
        """The cache, which has room and is donated, after the tokens of each row.

        A row may be empty. `progress` is called after each chunk.
        """
        longest, done = max(map(len, rows)), 0
        kind = (cache.batch_size, cache.capacity)
        if self._compile_ahead and longest and kind not in self._caches:
            self._caches[kind] = _shapes(cache)
        for tokens, lengths in _chunks(rows):
            size = tokens.shape[1]
            if compiled := self._compiled.get((*kind, size)):
                compiled.wait()
            cache = read_chunk(self.model, cache, tokens, lengths)
            done += size
            if progress is not None:
                jax.block_until_ready(cache.next_position)
                progress(min(done, longest), longest)
        return cache

    def score(self, cache: Cache, rows: Rows) -> tuple[list[TokenScores], Cache]:
        """Reads all tokens of each row but the last, and scores all but the first.

        Returns:
          The scores of each row, of len(row) - 1 tokens, and the cache; the one before
          stays valid.
        """
        nothing = TokenScores(np.zeros(0, np.float32), np.zeros(0, bool))
        scores = [[nothing] for _ in rows]
        fed, targets = [row[:-1] for row in rows], [row[1:] for row in rows]
        pairs = zip(_chunks(fed), _chunks(targets), strict=True)
        for (tokens, lengths), (following, _) in pairs:
            *found, cache = score_chunk(self.model, cache, tokens, following, lengths)
            parts = zip(scores, *jax.device_get(found), lengths, strict=True)
            for row, log_probs, is_best, length in parts:
                row.append(TokenScores(log_probs[:length], is_best[:length]))
        joined = [map(np.concatenate, zip(*row, strict=True)) for row in scores]
        return [TokenScores(*row) for row in joined], cache

    def compile_rest(self) -> None:
        """Compiles, in a thread, all chunk sizes for the batch sizes read so far."""
        # A thread does not have the caller's mesh, and so would compile other programs.
        if not jax.sharding.get_abstract_mesh().empty:
            return
        new = {
            (*kind, size): functools.partial(_compile_chunk, self.model, cache, size)
            for kind, cache in self._caches.items()
            for size in CHUNK_SIZES
            if (*kind, size) not in self._compiled
        }
        if new:
            self._compiled |= zip(new, call_beside(new.values()), strict=True)

    def wait(self) -> None:
        """Returns when no thread compiles a program of this model any more."""
        for compiled in list(self._compiled.values()):
            compiled.wait()

    def _capacity_for(self, num_tokens: int) -> int | None:
        """Slots of global attention for so many tokens: few sizes, so that there are
        few programs. None for a model without it."""
        if not cache_lib.grows(self.model.config):
            return None
        capacity = MIN_CAPACITY
        while capacity < num_tokens:
            capacity *= 2
        return capacity


def call_beside(functions: Collection[Callable[[], object]]) -> list[threading.Event]:
    """Calls functions in a thread, in turn; the events tell when each has returned.

    Whoever needs a program that failed there compiles it again and gets the error. An
    interpreter that ends waits for the present call alone.
    """
    events = [threading.Event() for _ in functions]

    def run():
        for function, event in zip(functions, events, strict=True):
            with contextlib.suppress(Exception):
                if threading.main_thread().is_alive():
                    function()
            event.set()

    # A daemon would be killed amid a compilation, which crashes the process.
    threading.Thread(target=run, name="compile ahead").start()
    return events


def _compile_chunk(model: Griffin, cache: Cache, size: int) -> None:
    tokens = jax.ShapeDtypeStruct((cache.batch_size, size), np.int32)
    lengths = jax.ShapeDtypeStruct((cache.batch_size,), np.int32)
    program = read_chunk.jitted(cache.batch_size)
    program.lower(model, cache, tokens, lengths).compile()


def _shapes(cache: Cache) -> Cache:
    """The cache without its arrays, to compile programs for."""

    def shape(leaf):
        sharding = leaf.sharding if leaf.committed else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, cache)


def _chunks(rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows cut into chunks: tokens, int32 [B, size], and their lengths, int32 [B]."""
    lengths, start = np.array([len(row) for row in rows], np.int32), 0
    for size in plan_chunks(int(lengths.max())):
        tokens = np.zeros((len(rows), size), np.int32)
        for chunk, row in zip(tokens, rows, strict=True):
            piece = row[start : start + size]
            chunk[: len(piece)] = piece
        yield tokens, np.clip(lengths - start, 0, size)
        start += size
