"""Texts into caches: chunk by chunk, in programs that no new length compiles.

A batch of rows is read to its longest one, shorter rows padded. A single text, or a
stream of lines that never ends, is read a piece at a time, so that the memory does not
depend on its length.
"""

import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.config import GriffinConfig
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.programs import (
    CHUNK_SIZES,
    new_cache,
    plan_chunks,
    read_chunk,
    score_chunk,
)
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer

MIN_CAPACITY = 128
"""Least size of a global-attention cache; others are this times a power of two."""
PIECE_TOKENS = CHUNK_SIZES[-1]
"""A stream is read as soon as this many tokens of it are there."""

Progress = Callable[[int, int | None], None]
"""Called while a text is read with the tokens read so far and in all (of the longest
row); None in all if that is not known."""


def read_rows(
    model: Griffin,
    cache: Cache,
    rows: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> Cache:
    """The cache after each row's tokens.

    Args:
      model: the model.
      cache: of as many rows; donated. Global layers have room for the tokens.
      rows: token ids; a row may be empty.
      progress: called after each chunk.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    longest = int(lengths.max())
    start = 0
    for size in plan_chunks(longest):
        tokens = np.zeros((len(rows), size), np.int32)
        for chunk, row in zip(tokens, rows, strict=True):
            piece = row[start : start + size]
            chunk[: len(piece)] = piece
        read = np.clip(lengths - start, 0, size)
        cache = read_chunk(model, cache, tokens, read)
        start += size
        if progress is not None:
            jax.block_until_ready(cache.next_position)
            progress(min(start, longest), longest)
    return cache


def compile_chunks(model: Griffin, cache: Cache) -> None:
    """Compiles the programs of all chunk sizes for caches like this one."""
    lengths = jax.ShapeDtypeStruct((cache.batch_size,), np.int32)
    for size in CHUNK_SIZES:
        tokens = jax.ShapeDtypeStruct((cache.batch_size, size), np.int32)
        read_chunk.lower(model, cache, tokens, lengths).compile()


def capacity_for(config: GriffinConfig, num_tokens: int) -> int | None:
    """Slots of global attention for texts of so many tokens: few sizes, so few programs.

    None for a model without global attention.
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
    if capacity is None or cache.capacity is None or capacity <= cache.capacity:
        return cache
    return cache_lib.grow(cache, config, capacity)


class Piece(NamedTuple):
    """A part of a text."""

    tokens: list[int]
    num_bytes: int | None
    """Bytes of its text; None if only its tokens are known."""


def pieces_of(
    text: str | Iterable[str] | Iterable[int],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    begin: bool,
) -> Iterator[Piece]:
    """A text as tokens, some lines at a time.

    Args:
      text: a text, which is one piece; its lines (an open file, for example), each
        tokenised by itself; or token ids.
      tokenizer: needed for text.
      vocab_size: ids are below it.
      begin: whether the begin token comes first; not before token ids.

    Yields:
      Pieces of at least `PIECE_TOKENS` tokens, except the last.

    Raises:
      ValueError: an item is neither; an id is not in the vocabulary; there is no
        tokenizer for text.
    """
    tokens: list[int] = []
    num_bytes: int | None = None
    for i, item in enumerate([text] if isinstance(text, str) else text):
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError("tokenizer: expected one to read text, got None")
            tokens += tokenizer.encode(item, add_bos=begin and i == 0)
            num_bytes = (num_bytes or 0) + len(item.encode())
        elif isinstance(item, numbers.Integral) and 0 <= item < vocab_size:
            tokens.append(int(item))
        else:
            raise ValueError(
                "text: expected a text, its lines or token ids in "
                f"[0, {vocab_size}), got {item!r:.40}"
            )
        if len(tokens) >= PIECE_TOKENS:
            yield Piece(tokens, num_bytes)
            tokens, num_bytes = [], None
    if tokens or num_bytes is not None:
        yield Piece(tokens, num_bytes)


class RowReader:
    """One text that is read on and on; at any time, what was read is a prefix.

    The last token is always held back, so the first one of a text is only fed, never
    scored.
    """

    def __init__(self, model: Griffin, model_digest: str, prefix: Prefix | None = None):
        """Starts after `prefix`, which stays valid, or with nothing.

        Raises:
          ValueError: the prefix has more than one row or was made by another model.
        """
        self._model = model
        self._digest = model_digest
        vocab_size = model.config.vocab_size
        if prefix is None:
            self._cache = new_cache(
                model, batch_size=1, capacity=capacity_for(model.config, 1)
            )
            self._held: list[int] = []
            self._num_tokens = 0
            self._seen = np.zeros((1, vocab_size), bool)
        else:
            prefix.check_model(model_digest)
            if prefix.batch_size != 1:
                raise ValueError(
                    f"prefix: expected one row, got {prefix.batch_size}; take one"
                )
            self._cache = prefix.cache
            self._held = prefix.last_token.tolist()
            self._num_tokens = int(prefix.num_tokens[0])
            self._seen = prefix.seen.copy()
        # A cache that somebody else holds must not be donated.
        self._is_shared = prefix is not None

    def read(self, tokens: list[int], progress: Progress | None = None) -> None:
        """Reads on; no tokens are nothing."""
        fed = self._feed(tokens)
        if self._is_shared:
            self._cache = jax.tree.map(jnp.copy, self._cache)
            self._is_shared = False
        if fed:
            self._cache = read_rows(self._model, self._cache, [fed], progress)

    def score(self, tokens: list[int]) -> np.ndarray:
        """Reads on; the log-probabilities of the tokens, float32 [len(tokens)].

        Of the first tokens ever there is one less.
        """
        held = self._held
        fed = self._feed(tokens)
        targets = [*held, *tokens][1:]
        log_probs, start = [np.zeros(0, np.float32)], 0
        for size in plan_chunks(len(fed)):
            part = fed[start : start + size]
            rows = np.zeros((2, 1, size), np.int32)
            rows[0, 0, : len(part)] = part
            rows[1, 0, : len(part)] = targets[start : start + size]
            lengths = np.array([len(part)], np.int32)
            scores, self._cache = score_chunk(self._model, self._cache, *rows, lengths)
            log_probs.append(np.asarray(scores)[0, : len(part)])
            start += size
        return np.concatenate(log_probs)

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return self._num_tokens

    def prefix(self) -> Prefix:
        """What was read so far.

        Raises:
          ValueError: nothing was.
        """
        if not self._held:
            raise ValueError("text: expected at least one token, got none")
        self._is_shared = True
        return Prefix(
            cache=self._cache,
            last_token=np.array(self._held, np.int32),
            num_tokens=np.array([self._num_tokens], np.int64),
            seen=self._seen.copy(),
            model_digest=self._digest,
        )

    def _feed(self, tokens: list[int]) -> list[int]:
        """The tokens that the cache is to see now: all but the last."""
        known = [*self._held, *tokens]
        self._held = known[-1:]
        self._num_tokens += len(tokens)
        self._seen[0, tokens] = True
        self._cache = make_room(self._cache, self._model.config, self._num_tokens)
        return known[:-1]
