"""Texts into caches: chunk by chunk, in programs that no new length compiles.

A batch of rows is read to its longest one, shorter rows padded. A single text, or a
stream of lines that never ends, is read a piece at a time, so that the memory does not
depend on its length.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.config import GriffinConfig
from recurrentgemma.generation.compile_ahead import BackgroundCompiler
from recurrentgemma.generation.history import History
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
"""Called while a text is read: with the number of tokens read so far, and of all tokens
of the longest row or None if that is not known."""
Text = str | bytes | Iterable[str] | Iterable[int]
"""A text (bytes are UTF-8); an open file or another iterator of lines; or token ids,
the begin token first, usually."""


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
    if "global_attention" not in config.block_types:
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
    positions = cache.global_key_positions
    return 0 if positions is None else positions.shape[1]


class Piece(NamedTuple):
    """Consecutive tokens of a text."""

    tokens: list[int]
    num_bytes: int | None
    """Length of the text in bytes of UTF-8; None if only the tokens are known."""


def token_ids(name: str, values, vocab_size: int) -> list[int]:
    """Token ids, checked.

    Args:
      name: how an error calls them.
      values: a sequence or an array of integers; it may be empty.
      vocab_size: ids are below it.

    Raises:
      ValueError: `values` is anything else, or an id is not in the vocabulary.
    """
    if isinstance(values, np.ndarray | jax.Array):
        values = np.asarray(values).tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise check.fail(name, "a text or a list of token ids", values)
    return [_token_id(name, value, vocab_size) for value in values]


def _token_id(name: str, value, vocab_size: int) -> int:
    try:
        return check.integer(name, value, minimum=0, maximum=vocab_size - 1)
    except ValueError:
        raise check.fail(name, f"tokens in [0, {vocab_size})", value) from None


def pieces_of(
    text: Text, tokenizer: Tokenizer | None, vocab_size: int, *, begin: bool
) -> Iterator[Piece]:
    """A text as tokens: all of it, or some lines of an iterator at a time.

    Args:
      text: see `Text`; each line of an iterator is tokenised by itself.
      tokenizer: needed for text.
      vocab_size: ids are below it.
      begin: whether the begin token comes first; not before token ids.

    Returns:
      Pieces; of an iterator, pieces of at least `PIECE_TOKENS` tokens but for the last.

    Raises:
      ValueError: the text is none of these; of an item when its turn comes.
    """
    if isinstance(text, str | bytes):
        return iter([_encode([text], tokenizer, begin)])
    if not isinstance(text, Iterable):
        raise check.fail("text", "a text, an open file or token ids", text)
    if isinstance(text, Iterator) or not isinstance(
        text, Sequence | np.ndarray | jax.Array
    ):
        return _pieces_of_items(iter(text), tokenizer, vocab_size, begin)
    if any(isinstance(item, str | bytes) for item in text):
        raise ValueError(
            "text: expected one text, an open file or token ids, got a list with "
            "texts; use score_many for several, or join them"
        )
    tokens = token_ids("text", text, vocab_size)
    return iter([Piece(tokens, None)] if tokens else [])


def _encode(lines: list, tokenizer: Tokenizer | None, begin: bool) -> Piece:
    if tokenizer is None:
        raise ValueError("tokenizer: expected one to read text, got None")
    encoded = [
        tokenizer.encode(line, add_bos=begin and i == 0) for i, line in enumerate(lines)
    ]
    data = [line if isinstance(line, bytes) else line.encode() for line in lines]
    return Piece([token for line in encoded for token in line], sum(map(len, data)))


def _pieces_of_items(
    items: Iterator, tokenizer: Tokenizer | None, vocab_size: int, begin: bool
) -> Iterator[Piece]:
    tokens: list[int] = []
    num_bytes: int | None = None
    is_text: bool | None = None
    for item in items:
        if is_text not in (None, isinstance(item, str | bytes)):
            raise check.fail("text", "lines alone or token ids alone", item)
        if isinstance(item, str | bytes):
            line = _encode([item], tokenizer, begin and is_text is None)
            tokens += line.tokens
            num_bytes = (num_bytes or 0) + (line.num_bytes or 0)
        else:
            tokens.append(_token_id("text", item, vocab_size))
        is_text = isinstance(item, str | bytes)
        if len(tokens) >= PIECE_TOKENS:
            yield Piece(tokens, num_bytes)
            tokens, num_bytes = [], None
    if tokens or num_bytes is not None:
        yield Piece(tokens, num_bytes)


class RowReader:
    """One text that is read on and on; at any time, the text so far is a prefix.

    The last token is always held back, so the first one of a text is only fed, never
    scored.
    """

    def __init__(
        self, reader: ChunkReader, model_digest: str, prefix: Prefix | None = None
    ):
        """Starts after `prefix`, which stays valid, or with nothing.

        Raises:
          ValueError: the prefix has more than one row or was made by another model.
        """
        self._reader = reader
        self._digest = model_digest
        if prefix is None:
            self._cache = reader.new_cache(1, 1)
            self._history = History.empty(reader.model.config.vocab_size)
        else:
            prefix.check_model(model_digest)
            if prefix.batch_size != 1:
                raise ValueError(
                    f"prefix: expected one row, got {prefix.batch_size}; take one"
                )
            self._cache, self._history = prefix.cache, prefix.history
        # A cache that somebody else holds must not be donated.
        self._is_shared = prefix is not None

    def read(self, tokens: list[int], progress: Progress | None = None) -> None:
        """Reads on; `tokens` may be empty."""
        fed = self._feed(tokens)
        if not fed:
            return
        if self._is_shared:
            self._cache = jax.tree.map(jnp.copy, self._cache)
            self._is_shared = False
        self._cache = self._reader.read(self._cache, [fed], progress)

    def score(self, tokens: list[int]) -> np.ndarray:
        """Reads on; the log-probabilities of the tokens, float32 [len(tokens)].

        There is one less for the first tokens of a text.
        """
        fed = self._feed(tokens)
        row = [*fed, *self._history.last_token.tolist()]
        [scores], self._cache = self._reader.score(self._cache, [row])
        return scores

    @property
    def num_tokens(self) -> int:
        """Number of tokens read so far."""
        return int(self._history.num_tokens[0])

    def prefix(self) -> Prefix:
        """The text so far.

        Raises:
          ValueError: it has no tokens.
        """
        if self.num_tokens == 0:
            raise ValueError("text: expected at least one token, got none")
        self._is_shared = True
        return Prefix(self._cache, self._history, self._digest)

    def _feed(self, tokens: list[int]) -> list[int]:
        """The tokens that the cache is to see now: all but the last."""
        fed, self._history = self._history.read(tokens)
        config = self._reader.model.config
        self._cache = make_room(self._cache, config, self.num_tokens)
        return fed
