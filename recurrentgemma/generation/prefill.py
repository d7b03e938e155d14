"""Texts into prefixes and scores, a piece at a time.

The memory does not depend on the length of a text, nor do the lines of a file have to
end. Several texts are scored in batches.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma import cache as cache_lib
from recurrentgemma.generation.chunk_reader import ChunkReader, Progress, make_room
from recurrentgemma.generation.history import History
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.programs import CHUNK_SIZES
from recurrentgemma.tokenizer import Tokenizer

PIECE_TOKENS = CHUNK_SIZES[-1]
"""A stream is read as soon as this many tokens of it are there."""

Text = str | bytes | Iterable[str] | Iterable[int]
"""A text (bytes are UTF-8); an open file or another iterator of lines; or token ids,
the begin token first, usually."""


class Piece(NamedTuple):
    """Consecutive tokens of a text."""

    tokens: list[int]
    num_bytes: int | None
    """Length of the text in bytes of UTF-8; None if only the tokens are known."""


def is_whole(text: Text) -> bool:
    """Whether all of a text is there, rather than lines that are yet to come."""
    return isinstance(text, str | bytes | Sequence | np.ndarray | jax.Array)


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
        return iter([_encode(text, tokenizer, begin)])
    check.series("text", text, "a text, an open file or token ids")
    if not is_whole(text):
        return _pieces_of_items(text, tokenizer, vocab_size, begin)
    if any(isinstance(item, str | bytes) for item in text):
        raise ValueError(
            "text: expected one text, an open file or token ids, got a list with "
            "texts; use score_many for several, or join them"
        )
    tokens = check.token_ids("text", text, vocab_size)
    return iter([Piece(tokens, None)] if tokens else [])


def _encode(text: str | bytes, tokenizer: Tokenizer | None, begin: bool) -> Piece:
    if tokenizer is None:
        raise ValueError("tokenizer: expected one to read text, got None")
    tokens = tokenizer.encode(text, add_bos=begin)
    return Piece(tokens, len(text if isinstance(text, bytes) else text.encode()))


def _pieces_of_items(
    items: Iterable, tokenizer: Tokenizer | None, vocab_size: int, begin: bool
) -> Iterator[Piece]:
    tokens: list[int] = []
    num_bytes: int | None = None
    was_text: bool | None = None
    for item in items:
        is_text = isinstance(item, str | bytes)
        if was_text not in (None, is_text):
            check.refuse("text", "lines alone or token ids alone", item)
        if is_text:
            line = _encode(item, tokenizer, begin and was_text is None)
            tokens += line.tokens
            num_bytes = (num_bytes or 0) + (line.num_bytes or 0)
        else:
            tokens += check.token_ids("text", [item], vocab_size)
        was_text = is_text
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


def score_rows(
    reader: ChunkReader,
    rows: Sequence[Sequence[int]],
    batch_size: int,
    prefix: Prefix | None,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """The log-probabilities of each row's tokens after its first, a batch at a time.

    Args:
      reader: the model.
      rows: token ids, at least one in each row.
      batch_size: rows at a time; fewer if there are fewer.
      prefix: what comes before each row, one row, but for its last token, with which
        the rows begin.
      progress: called after each batch with the rows scored so far, and all.
    """
    batch_size = min(batch_size, len(rows))
    start = 0 if prefix is None else int(prefix.num_tokens[0])
    # Rows of like lengths together, so that little is padded.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores: dict[int, np.ndarray] = {}
    while waiting := order[len(scores) : len(scores) + batch_size]:
        room = start + len(rows[waiting[0]])
        if prefix is None:
            cache = reader.new_cache(batch_size, room)
        else:
            cache = make_room(prefix.cache, reader.model.config, room)
            cache = cache_lib.repeat(cache, batch_size)
        # The last batch is filled up: another size would be another program.
        padding = [[0]] * (batch_size - len(waiting))
        found, _ = reader.score(cache, [*(rows[i] for i in waiting), *padding])
        scores |= zip(waiting, found, strict=False)
        if progress is not None:
            progress(len(scores), len(rows))
    return [scores[i] for i in range(len(rows))]
