"""A model's hidden states and log-probabilities of given tokens, at constant memory."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma.griffin import Griffin

PIECE_TOKENS = 256
"""All pieces are padded to this: one program reads any of them."""


class Reader:
    """Reads tokens from an empty cache, in pieces padded to one shape.

    Args:
      model: the model.
      capacity: the most tokens, which a cache of global attention must hold.
    """

    def __init__(self, model: Griffin, capacity: int):
        self.model = model
        self._capacity = capacity

    def whole(self, ids: Sequence[int]) -> np.ndarray:
        """Hidden states float32 [T, D], of one call and no cache."""
        hidden, _ = _read(self.model, np.asarray([ids], np.int32), None, None)
        return np.asarray(hidden[0], np.float32)

    def hidden(self, ids: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
        """Hidden states float32 [T, D], of pieces of these sizes in turn."""
        pieces = self._pieces(ids, sizes)
        return np.concatenate(
            [np.asarray(hidden[0, :count], np.float32) for _, count, hidden in pieces]
        )

    def log_probs(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of each token but the first, float32 [T - 1], in nats: its log-probability,
        and how far it is below the most probable one."""
        found = []
        for start, count, hidden in self._pieces(ids[:-1], (PIECE_TOKENS,)):
            targets = np.zeros((1, PIECE_TOKENS), np.int32)
            targets[0, :count] = ids[start + 1 : start + 1 + count]
            scores = _score(self.model, hidden, targets)
            found.append(np.asarray(scores)[:, 0, :count])
        log_probs, below_best = np.concatenate(found, axis=1)
        return log_probs, below_best

    def _pieces(
        self, ids: Sequence[int], sizes: Sequence[int]
    ) -> Iterator[tuple[int, int, jax.Array]]:
        """Where each piece starts, its length, and hidden states [1, padded, D]."""
        cache = self.model.init_cache(1, capacity=self._capacity)
        start = 0
        for size in itertools.cycle(sizes):
            count = min(size, len(ids) - start)
            if not count:
                return
            tokens = np.zeros((1, PIECE_TOKENS), np.int32)
            tokens[0, :count] = ids[start : start + count]
            positions = np.full((1, PIECE_TOKENS), -1, np.int32)
            positions[0, :count] = np.arange(start, start + count)
            hidden, cache = _read(self.model, tokens, positions, cache)
            yield start, count, hidden
            start += count


@jax.jit
def _read(model, tokens, positions, cache):
    return model(tokens, positions, cache)


@jax.jit
def _score(model, hidden, targets):
    """float32 [2, B, T]: log-probabilities of the targets, and how far below the best."""
    logits = model.logits(hidden)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return jnp.stack([chosen - normaliser, logits.max(axis=-1) - chosen])
