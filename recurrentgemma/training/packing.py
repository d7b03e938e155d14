"""Rows of T inputs and T targets from a stream of documents, kept exactly apart.

Positions count within documents: 0 begins one, and nothing from before reaches it. The
loss counts the targets that the stream counts; BOS, which opens a document, is none, since
what comes before it says nothing about it.

A stream of texts is cut into rows wherever they end: row r is the T + 1 tokens from r T
on, so that every token but the first is a target once, and a row may begin inside a
document, at a position above 0, which a model that has read nothing accepts.

A stream with responses is packed in whole documents: a row has as many as fit into T + 1
tokens, in order. Of a document of more tokens the first T + 1 are kept; it is left out if
none of them counts. (A text is cut into rows here too.)
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from recurrentgemma import _validation as check
from recurrentgemma.training.streams import TokenStream, stream_of


class Batch(NamedTuple):
    """Arrays [B, T]; NumPy's on the host, JAX's inside a step."""

    tokens: Any
    """int32; 0 at padding."""
    positions: Any
    """int32, the position of each token in its document; -1 is padding."""
    targets: Any
    """int32, the token after each token."""
    mask: Any
    """float32, 1 where the target counts."""


class PackedTokens:
    """A stream of documents, in rows.

    Args:
      documents: a stream, or the token ids of each document, BOS first.
      row_tokens: T, number of inputs of a row.
      whole: packs whole documents, so that no row parts a prompt from its response.

    Raises:
      ValueError: row_tokens is less than 1, there are no two tokens, or whole
          documents leave no target that counts.
    """

    num_rows: int
    """Number of rows of an epoch."""
    num_shortened: int = 0
    """Number of documents whose end is left out, and with it a part of a response."""
    num_left_out: int = 0
    """Number of documents that are left out, whose responses begin too late."""

    def __init__(
        self,
        documents: TokenStream | Iterable[Sequence[int]],
        row_tokens: int,
        *,
        whole: bool = False,
    ):
        self.row_tokens = check.positive_integer("sequence_length", row_tokens)
        if not isinstance(documents, TokenStream):
            documents = stream_of(documents)
        self._stream = documents
        self._columns = (documents.tokens, documents.positions, documents.counted)
        total = len(documents.tokens)
        if total < 2:
            raise ValueError(
                f"data: expected two tokens at least, got {total}; give more text"
            )
        # A window of each place is a view: taking some of them copies whole rows.
        size = row_tokens + 1
        views = [sliding_window_view(c, size) for c in self._columns if total >= size]
        self._windows = tuple(views)
        if whole:
            self._pack_whole()
        else:
            self._starts = None
            self.num_rows = -(-(total - 1) // row_tokens)

    def _pack_whole(self) -> None:
        limit, step = self.row_tokens + 1, self.row_tokens
        counted = self._stream.counted
        starts = np.flatnonzero(self._stream.positions == 0)
        bounds = np.append(starts, len(counted))
        rows: list[tuple[int, int]] = []
        document = 0
        while document < len(starts):
            start, end = int(bounds[document]), int(bounds[document + 1])
            if end - start <= limit:
                last = int(np.searchsorted(bounds, start + limit, "right")) - 1
                rows.append((start, int(bounds[last])))
                document = last
                continue
            document += 1
            if counted[start + 1]:  # a text, without a prompt
                rows += [(i, min(i + limit, end)) for i in range(start, end - 1, step)]
            elif counted[start : start + limit].any():
                rows.append((start, start + limit))
                self.num_shortened += 1
            else:
                self.num_left_out += 1
        if not rows:
            raise ValueError(
                f"sequence_length: expected one within which a response begins, got "
                f"{self.row_tokens}, of which the prompts leave nothing; give a larger one"
            )
        self.num_rows = len(rows)
        self._starts, self._ends = np.array(rows, np.int64).T

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows of these indices; an index past the last one is a row of padding."""
        return as_batch(*self.windows(indices))

    def windows(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """The T + 1 tokens of each row, for `as_batch`.

        Returns:
          Tokens int32, positions int32 and whether each counts, [len(indices), T + 1].
        """
        size = self.row_tokens + 1
        total = len(self._stream.tokens)
        exists = indices < self.num_rows
        known = np.where(exists, indices, 0)
        if self._starts is None:
            starts = known * self.row_tokens
            ends = np.minimum(starts + size, total)
        else:
            starts, ends = self._starts[known], self._ends[known]
        if self._windows and starts.max(initial=0) + size <= total:
            columns = [window[starts] for window in self._windows]
        else:
            places = np.minimum(starts[:, None] + np.arange(size), total - 1)
            columns = [column[places] for column in self._columns]
        tokens, positions, counted = columns
        tokens = tokens.astype(np.int32)
        sizes = np.where(exists, ends - starts, 0)
        if sizes.min(initial=size) < size:
            outside = np.arange(size)[None] >= sizes[:, None]
            tokens[outside], positions[outside], counted[outside] = 0, -1, False
        return tokens, positions, counted

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """All rows in order, or the first `limit` batches; padded to `batch_size`."""
        count = -(-self.num_rows // batch_size)
        for index in range(count if limit is None else min(limit, count)):
            yield self.rows(np.arange(index * batch_size, (index + 1) * batch_size))


def as_batch(tokens: np.ndarray, positions: np.ndarray, counted: np.ndarray) -> Batch:
    """Inputs and targets of rows of T + 1 tokens; see `PackedTokens.windows`."""
    return Batch(
        tokens=tokens[:, :-1],
        positions=positions[:, :-1],
        targets=tokens[:, 1:],
        mask=counted[:, 1:].astype(np.float32),
    )
