"""Perplexity and bits per byte of texts of any length, in constant memory."""

import math
from typing import NamedTuple

from recurrentgemma.generation.results import Score


class TextFigures(NamedTuple):
    """Figures of a text so far; `Sampler.score_stream` gives the scores of its pieces.

    Attributes:
      tokens: Number of scored tokens.
      bytes: Number of bytes of UTF-8.
      log_prob: Sum of the log-probabilities, in nats.
    """

    tokens: int = 0
    bytes: int = 0
    log_prob: float = 0.0

    def add(self, score: Score) -> "TextFigures":
        """The figures after one more piece."""
        return TextFigures(
            self.tokens + len(score.tokens),
            self.bytes + (score.num_bytes or 0),
            self.log_prob + score.total_log_prob,
        )

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log-probability of a token; nan without tokens."""
        return math.exp(-self.log_prob / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Minus the log-probability in bits for a byte of text; nan without bytes."""
        return -self.log_prob / math.log(2) / self.bytes if self.bytes else math.nan
