"""The tokens of rows, as far as later steps must know them.

A cache has seen every token of a row but the last one, which is held back: whatever
comes next feeds it first, so that sampling, scoring and chat continue alike.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class History(NamedTuple):
    """Last token, number and set of the tokens of each row; NumPy or JAX arrays."""

    last_token: Any
    """int32 [B], the last token of each row, which its cache has not seen."""
    num_tokens: Any
    """int32 [B], number of tokens, the last one included; 0 before the first."""
    seen: Any
    """bool [B, V], which tokens the row holds, for repetition penalties; None on a
    device where there is no penalty."""

    @classmethod
    def empty(cls, vocab_size: int) -> "History":
        """One row without tokens, on the host."""
        zero = np.zeros(1, np.int32)
        return cls(zero, zero, np.zeros((1, vocab_size), bool))

    @classmethod
    def concatenate(cls, histories: Sequence["History"]) -> "History":
        """The rows of several histories, on the host."""
        return cls(*map(np.concatenate, zip(*histories, strict=True)))

    def read(self, tokens: Sequence[int]) -> tuple[list[int], "History"]:
        """Reads on, on the host; the history has one row.

        Returns:
          The tokens that the cache is to see now, and the history after `tokens`.
        """
        held = self.last_token.tolist() if self.num_tokens[0] else []
        known = [*held, *tokens]
        seen = self.seen.copy()
        seen[0, list(tokens)] = True
        last = np.array(known[-1:] or [0], np.int32)
        count = self.num_tokens + np.int32(len(tokens))
        return known[:-1], History(last, count, seen)

    def append(self, token, is_new) -> "History":
        """One more token, int32 [B], on the device, for the rows where `is_new`."""
        token = jnp.where(is_new, token, self.last_token)
        seen = self.seen
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        return History(token, self.num_tokens + is_new, seen)
