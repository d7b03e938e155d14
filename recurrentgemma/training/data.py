"""Packed rows of tokens, with documents kept exactly apart.

Every document is BOS, its tokens, EOS. All documents make one stream, and row r is the
T + 1 tokens from r T on: T inputs and their T targets. Positions count within documents,
so that a row that begins inside one begins at a position above 0, which a model that has
read nothing accepts. The loss leaves out targets that open a document (position 0): what
comes before them says nothing about them.

Batches are a pure function of (seed, step), which is all that resuming needs.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import Document

# Text is cut at random places, this many characters apart on average, and the parts are
# encoded one by one, so that a prompt that ends inside a piece is nothing new.
CHARACTERS_PER_CUT = 256


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
    """A stream of documents, cut in rows.

    Args:
        documents: the token ids of each document, BOS first.
        row_tokens: T, inputs of a row.

    Raises:
        ValueError: row_tokens is less than 1, or there are no two tokens.
    """

    def __init__(self, documents: Iterable[list[int]], row_tokens: int):
        if row_tokens < 1:
            raise ValueError(f"sequence_length must be at least 1, got {row_tokens}")
        tokens = [np.asarray(ids, np.int32) for ids in documents]
        total = sum(len(ids) for ids in tokens)
        if total < 2:
            raise ValueError(f"data: expected two tokens at least, got {total}")
        self.row_tokens = row_tokens
        self.num_rows = -(-(total - 1) // row_tokens)
        size = self.num_rows * row_tokens + 1
        positions = [np.arange(len(ids), dtype=np.int32) for ids in tokens]
        self._tokens = np.zeros(size, np.int32)
        self._tokens[:total] = np.concatenate(tokens)
        self._positions = np.full(size, -1, np.int32)
        self._positions[:total] = np.concatenate(positions)

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows of these indices; an index past the last one is a row of padding."""
        start = np.minimum(indices, self.num_rows) * self.row_tokens
        places = start[:, None] + np.arange(self.row_tokens + 1)
        exists = places < len(self._tokens)
        places = np.minimum(places, len(self._tokens) - 1)
        tokens = np.where(exists, self._tokens[places], 0)
        positions = np.where(exists, self._positions[places], -1)
        # The last place of the stream is the target of the last row, and no more.
        positions[indices >= self.num_rows] = -1
        return Batch(
            tokens=tokens[:, :-1],
            positions=positions[:, :-1],
            targets=tokens[:, 1:],
            mask=(positions[:, 1:] > 0).astype(np.float32),
        )

    def shuffled_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of a step: every epoch has every row once, in an order of its own.

        Args:
            step: steps done before this one.
            batch_size: B. A batch may end one epoch and begin the next.
            seed: of the order.
        """
        indices = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, places = np.divmod(indices, self.num_rows)
        rows = [
            _order(seed, int(epoch), self.num_rows)[place]
            for epoch, place in zip(epochs, places, strict=True)
        ]
        return self.rows(np.asarray(rows))

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """All rows in order, or the first `limit` batches; padded to `batch_size`."""
        count = -(-self.num_rows // batch_size)
        for index in range(count if limit is None else min(limit, count)):
            yield self.rows(np.arange(index * batch_size, (index + 1) * batch_size))


def encode_document(
    tokenizer: Tokenizer, document: Document, *, cut_seed: int | None = None
) -> list[int]:
    """BOS, the document's tokens, EOS.

    Args:
        tokenizer: what encodes.
        document: what is encoded.
        cut_seed: cuts the text at random places first (see `CHARACTERS_PER_CUT`);
            depends on the seed and the document's name alone. None does not.
    """
    parts = [document.text]
    if cut_seed is not None:
        name = hashlib.sha256(document.name.encode()).digest()
        generator = np.random.default_rng([cut_seed, *name])
        size = len(document.text)
        cuts = np.sort(generator.integers(0, size, size // CHARACTERS_PER_CUT))
        ends = [*cuts.tolist(), size]
        parts = [
            document.text[start:end]
            for start, end in zip([0, *ends], ends, strict=False)
        ]
    ids = [tokenizer.bos_id]
    for part in parts:
        ids += tokenizer.encode(part, add_bos=False)
    return [*ids, tokenizer.eos_id]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
