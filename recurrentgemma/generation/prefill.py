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
from recurrentgemma.cache import Cache
from recurrentgemma.generation.chunk_reader import ChunkReader, Progress
from recurrentgemma.generation.history import History
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.programs import CHUNK_SIZES
from recurrentgemma.generation.requests import Inputs, num_bytes
from recurrentgemma.generation.results import Score

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


def pieces_of(text: Text, inputs: Inputs, *, begin: bool) -> Iterable[Piece]:
    """A text as tokens, checked; with `begin`, the begin token before it (ids have it).

    Returns:
      A list of at most one piece; for an iterator of lines, each tokenised by itself,
      an iterator of pieces of at least `PIECE_TOKENS` tokens but for the last.
    """
    if isinstance(text, str | bytes):
        return [Piece(inputs.tokens("text", text, begin=begin), num_bytes(text))]
    check.series("text", text, "a text, an open file or token ids")
    if not isinstance(text, Sequence | np.ndarray | jax.Array):
        return _pieces_of_items(text, inputs, begin)
    if any(isinstance(item, str | bytes) for item in text):
        raise ValueError(
            "text: expected one text, an open file or token ids, got a list with "
            "texts; use score_many for several, or join them"
        )
    tokens = check.token_ids("text", text, inputs.vocab_size)
    return [Piece(tokens, None)] if tokens else []


def _pieces_of_items(items: Iterable, inputs: Inputs, begin: bool) -> Iterator[Piece]:
    tokens: list[int] = []
    size: int | None = None
    was_text: bool | None = None
    for item in items:
        is_text = isinstance(item, str | bytes)
        if was_text not in (None, is_text):
            check.refuse("text", "lines alone or token ids alone", item)
        if is_text:
            tokens += inputs.tokens("text", item, begin=begin and was_text is None)
            size = (size or 0) + (num_bytes(item) or 0)
        else:
            tokens += check.token_ids("text", [item], inputs.vocab_size)
        was_text = is_text
        if len(tokens) >= PIECE_TOKENS:
            yield Piece(tokens, size)
            tokens, size = [], None
    if tokens or size is not None:
        yield Piece(tokens, size)


def read(
    reader: ChunkReader,
    pieces: Iterable[Piece],
    prefix: Prefix | None,
    model_digest: str,
    progress: Progress | None = None,
) -> Prefix:
    """The prefix after all pieces of a text; a list of pieces is all there is.

    `prefix`, one row that comes before the text, stays valid.

    Raises:
      ValueError: there are no tokens at all.
    """
    before = 0

    def show(done: int, total: int | None):
        assert progress is not None
        is_whole = isinstance(pieces, Sequence)
        progress(*((done, total) if is_whole else (before + done, None)))

    cache, history = _start(reader, prefix)
    # What somebody else holds must not be donated.
    cache = jax.tree.map(jnp.copy, cache)
    for piece in pieces:
        before = int(history.num_tokens[0])
        fed, history = history.read(piece.tokens)
        cache = reader.make_room(cache, int(history.num_tokens[0]))
        if fed:
            cache = reader.read(cache, [fed], None if progress is None else show)
    if not history.num_tokens[0]:
        raise ValueError("text: expected at least one token, got none")
    return Prefix(cache, history, model_digest)


def score(
    reader: ChunkReader,
    pieces: Iterable[Piece],
    prefix: Prefix | None,
    model_digest: str,
) -> Iterator[Score]:
    """The scores of each piece of a text; arguments as for `read`."""
    cache, history = _start(reader, prefix)
    for piece in pieces:
        fed, history = history.read(piece.tokens)
        cache = reader.make_room(cache, int(history.num_tokens[0]))
        row = [*fed, *history.last_token.tolist()]
        [(log_probs, _)], cache = reader.score(cache, [row])
        # Nothing comes before the first token of all.
        tokens = piece.tokens[len(piece.tokens) - len(log_probs) :]
        after = Prefix(cache, history, model_digest)
        yield Score(tokens, log_probs, piece.num_bytes, after)


def _start(reader: ChunkReader, prefix: Prefix | None) -> tuple[Cache, History]:
    if prefix is None:
        return reader.new_cache(1, 1), History.empty(reader.model.config.vocab_size)
    return prefix.cache, prefix.history


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
      batch_size: most rows at a time.
      prefix: one row, which comes before each; the rows begin with its last token.
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
            cache = reader.make_room(prefix.cache, room)
            cache = cache_lib.repeat(cache, batch_size)
        # The last batch is filled up: another size would be another program.
        padding = [[0]] * (batch_size - len(waiting))
        found, _ = reader.score(cache, [*(rows[i] for i in waiting), *padding])
        for i, score in zip(waiting, found, strict=False):
            scores[i] = score.log_probs
        if progress is not None:
            progress(len(scores), len(rows))
    return [scores[i] for i in range(len(rows))]
