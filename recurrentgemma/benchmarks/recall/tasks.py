"""Tasks that ask for what stood earlier in the sequence, made by a seeded generator.

    copying    noise with data tokens among it, then markers: the data, in order
               (selective copying; Griffin, arXiv 2402.19427, appendix H)
    induction  random tokens, a special token once and again at the end: the token that
               followed it (induction heads; the same appendix)
    mqar       key-value pairs, then keys among random tokens: the value of each
               (multi-query associative recall; Zoology, arXiv 2312.04927)
    phone_book names with numbers of several digits, then a name: its number
               (Griffin, section 6.2)

Only the answers count: in the loss, and in the accuracy.
"""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np


class Examples(NamedTuple):
    """Rows of a task, NumPy arrays."""

    tokens: np.ndarray
    """int32 [B, T], what the model reads."""
    places: np.ndarray
    """int32 [B, K], the indices in a row after which an answer is due."""
    answers: np.ndarray
    """int32 [B, K], the right next tokens there."""


class Task(Protocol):
    """What a benchmark needs of a task."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        ...

    def sample(
        self, rng: np.random.Generator, batch_size: int, length: int
    ) -> Examples:
        """Random rows.

        Args:
          rng: source of the rows.
          batch_size: B.
          length: what grows: tokens of the part to remember, T of it or near it.
        """
        ...


def _draw_without_replacement(
    rng: np.random.Generator, rows: int, population: int, count: int
) -> np.ndarray:
    """[rows, count] integers below `population`, different in each row."""
    if count > population:
        raise ValueError(
            f"length: expected room for {count} different items, got {population}; "
            "take a longer sequence or fewer items"
        )
    return rng.random((rows, population)).argpartition(count - 1, axis=1)[:, :count]


@dataclasses.dataclass(frozen=True)
class Copying:
    """`length` tokens that hold the data, then a marker for each data token."""

    vocab_size: int = 16
    num_data: int = 16
    """Number of tokens to copy."""

    NOISE, MARKER, FIRST_DATA = 0, 1, 2

    def sample(
        self, rng: np.random.Generator, batch_size: int, length: int
    ) -> Examples:
        """T = length + num_data; K = num_data."""
        places = _draw_without_replacement(rng, batch_size, length, self.num_data)
        places.sort(axis=1)
        data = rng.integers(self.FIRST_DATA, self.vocab_size, places.shape)
        tokens = np.full((batch_size, length + self.num_data), self.MARKER, np.int32)
        tokens[:, :length] = self.NOISE
        np.put_along_axis(tokens, places, data, axis=1)
        markers = np.tile(np.arange(length, length + self.num_data), (batch_size, 1))
        return Examples(tokens, markers.astype(np.int32), data.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Induction:
    """`length` tokens, of which the last is the special one."""

    vocab_size: int = 16

    SPECIAL = 0

    def sample(
        self, rng: np.random.Generator, batch_size: int, length: int
    ) -> Examples:
        """T = length; K = 1."""
        if length < 3:
            raise ValueError(f"length: expected at least 3 tokens, got {length}")
        tokens = rng.integers(1, self.vocab_size, (batch_size, length)).astype(np.int32)
        rows = np.arange(batch_size)
        first = rng.integers(0, length - 2, batch_size)
        tokens[rows, first] = tokens[:, -1] = self.SPECIAL
        places = np.full((batch_size, 1), length - 1, np.int32)
        return Examples(tokens, places, tokens[rows, first + 1][:, None])


@dataclasses.dataclass(frozen=True)
class Mqar:
    """`num_pairs` pairs, then the keys at random places of the remaining tokens.

    Keys are the lower half of the vocabulary, values the upper one; the gap before a
    key is drawn from a power law, so that most questions come early (Zoology, E.1).
    """

    vocab_size: int = 8192
    num_pairs: int = 4
    power: float = 0.01

    def sample(
        self, rng: np.random.Generator, batch_size: int, length: int
    ) -> Examples:
        """T = length; K = num_pairs."""
        half, pairs = self.vocab_size // 2, self.num_pairs
        slots = (length - 2 * pairs) // 2
        if slots < pairs:
            raise ValueError(
                f"length: expected at least {4 * pairs} tokens for {pairs} pairs and "
                f"their questions, got {length}"
            )
        # Index 0 is no key, as in Zoology, where it fills empty places.
        keys = 1 + _draw_without_replacement(rng, batch_size, half - 1, pairs)
        values = rng.integers(half, self.vocab_size, keys.shape)
        tokens = rng.integers(0, self.vocab_size, (batch_size, length))
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        # Exponential keys draw without replacement in proportion to the weights.
        weights = self.power * np.arange(1.0, slots + 1) ** (self.power - 1)
        drawn = rng.exponential(size=(batch_size, slots)) / weights
        gaps = np.argsort(drawn, axis=1)[:, :pairs]
        places = 2 * pairs + 2 * gaps
        np.put_along_axis(tokens, places, keys, axis=1)
        return Examples(
            tokens.astype(np.int32), places.astype(np.int32), values.astype(np.int32)
        )


@dataclasses.dataclass(frozen=True)
class PhoneBook:
    """A book of `length` entries, a name and its number, then one of the names.

    A name is two tokens and no two entries share one; a number has `num_digits` tokens,
    which are given after the question as they are asked for.
    """

    vocab_size: int = 128
    num_digits: int = 4

    DIGITS = 10

    def sample(
        self, rng: np.random.Generator, batch_size: int, length: int
    ) -> Examples:
        """T = (length + 1) (2 + num_digits) - 1; K = num_digits."""
        names = self.vocab_size - self.DIGITS
        drawn = _draw_without_replacement(rng, batch_size, names * names, length)
        digits = rng.integers(0, self.DIGITS, (batch_size, length, self.num_digits))
        first, second = np.divmod(drawn, names)
        entries = np.concatenate(
            [np.stack([first, second], axis=-1) + self.DIGITS, digits], axis=-1
        )
        asked = entries[np.arange(batch_size), rng.integers(0, length, batch_size)]
        book = entries.reshape(batch_size, -1)
        tokens = np.concatenate([book, asked[:, :-1]], axis=1).astype(np.int32)
        start = book.shape[1] + 1
        places = np.tile(np.arange(start, start + self.num_digits), (batch_size, 1))
        return Examples(tokens, places.astype(np.int32), asked[:, 2:].astype(np.int32))
