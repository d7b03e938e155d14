"""Rows of tokens into a cache, chunk by chunk, in programs that no new length compiles.

A batch of rows is read to its longest one, shorter rows padded.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.config import GriffinConfig
from recurrentgemma.generation.compile_ahead import BackgroundCompiler
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


class ChunkReader:
    """A model that reads rows of tokens into caches, chunk by chunk."""

    def __init__(self, model: Griffin, *, compile_ahead: bool = False):
        """Compiles nothing yet.

        Args:
          model: the model.
          compile_ahead: whether `compile_rest` does anything.
        """
        self.model = model
        self._compiler = BackgroundCompiler() if compile_ahead else None
        self._new: dict[tuple[int, int], Cache] = {}

    def new_cache(self, batch_size: int, num_tokens: int) -> Cache:
        """An empty cache with room for so many tokens in each row."""
        capacity = capacity_for(self.model.config, num_tokens)
        return new_cache(self.model, batch_size=batch_size, capacity=capacity)

    def read(
        self,
        cache: Cache,
        rows: Sequence[Sequence[int]],
        progress: Progress | None = None,
    ) -> Cache:
        """The cache after each row's tokens.

        Args:
          cache: as many rows, with room for the tokens; donated.
          rows: token ids; a row may be empty.
          progress: called after each chunk.
        """
        longest, done = max(map(len, rows)), 0
        kind = (cache.batch_size, _capacity(cache))
        if self._compiler is not None and longest and kind not in self._new:
            self._new[kind] = _shapes(cache)
        for tokens, lengths in _chunks(rows):
            size = tokens.shape[1]
            if self._compiler is not None:
                self._compiler.wait((*kind, size))
            cache = read_chunk(self.model, cache, tokens, lengths)
            done += size
            if progress is not None:
                jax.block_until_ready(cache.next_position)
                progress(min(done, longest), longest)
        return cache

    def score(
        self, cache: Cache, rows: Sequence[Sequence[int]]
    ) -> tuple[list[np.ndarray], Cache]:
        """Reads all tokens of each row but the last, and scores all but the first.

        Args:
          cache: as many rows, with room for the tokens; it stays valid.
          rows: token ids, at least one in each row.

        Returns:
          The log-probabilities of each row, float32 [len(row) - 1], and the cache.
        """
        scores = [[np.zeros(0, np.float32)] for _ in rows]
        fed, targets = [row[:-1] for row in rows], [row[1:] for row in rows]
        pairs = zip(_chunks(fed), _chunks(targets), strict=True)
        for (tokens, lengths), (following, _) in pairs:
            chunk, cache = score_chunk(self.model, cache, tokens, following, lengths)
            parts = zip(scores, np.asarray(chunk), lengths, strict=True)
            for row, log_probs, length in parts:
                row.append(log_probs[:length])
        return [np.concatenate(row) for row in scores], cache

    def compile_rest(self) -> None:
        """Compiles, in a thread, all chunk sizes for the batch sizes read so far."""
        # A thread does not have the caller's mesh, and so would compile other programs.
        if self._compiler is None or not jax.sharding.get_abstract_mesh().empty:
            return
        programs = {
            (*kind, size): functools.partial(_compile_chunk, self.model, cache, size)
            for kind, cache in self._new.items()
            for size in CHUNK_SIZES
        }
        self._compiler.start(programs)

    def wait(self) -> None:
        """Returns when nothing is being compiled in a thread any more."""
        if self._compiler is not None:
            self._compiler.wait_for_all()


def _chunks(
    rows: Sequence[Sequence[int]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows cut into chunks: tokens, int32 [B, size], and their lengths, int32 [B]."""
    lengths, start = np.array([len(row) for row in rows], np.int32), 0
    for size in plan_chunks(int(lengths.max())):
        tokens = np.zeros((len(rows), size), np.int32)
        for chunk, row in zip(tokens, rows, strict=True):
            piece = row[start : start + size]
            chunk[: len(piece)] = piece
        yield tokens, np.clip(lengths - start, 0, size)
        start += size


def _compile_chunk(model: Griffin, cache: Cache, size: int) -> None:
    tokens = jax.ShapeDtypeStruct((cache.batch_size, size), np.int32)
    lengths = jax.ShapeDtypeStruct((cache.batch_size,), np.int32)
    read_chunk.lower(model, cache, tokens, lengths).compile()


def _shapes(cache: Cache) -> Cache:
    """The cache without its arrays, to compile programs for."""

    def shape(leaf):
        sharding = leaf.sharding if leaf.committed else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, cache)


def capacity_for(config: GriffinConfig, num_tokens: int) -> int | None:
    """Slots of global attention for so many tokens; None for a model without it.

    There are few sizes, so that there are few programs.
    """
    if not cache_lib.grows(config):
        return None
    capacity = MIN_CAPACITY
    while capacity < num_tokens:
        capacity *= 2
    return capacity


def make_room(cache: Cache, config: GriffinConfig, num_tokens: int) -> Cache:
    """The cache, its global layers grown to hold so many tokens if they cannot yet."""
    capacity = capacity_for(config, num_tokens)
    if capacity is None or capacity <= _capacity(cache):
        return cache
    return cache_lib.grow(cache, config, capacity)


def same_room(caches: Sequence[Cache], config: GriffinConfig) -> list[Cache]:
    """The caches, their global layers grown to the largest of them."""
    capacity = max(map(_capacity, caches))
    return [make_room(cache, config, capacity) for cache in caches]


def _capacity(cache: Cache) -> int:
    """Slots of global attention; 0 without it."""
    return cache.capacity or 0
