"""Batches from sources of rows with weights: a pure function of the seed and the step.

Batches are filled slot after slot. Which source fills a slot follows from the weights w_k
alone, in whole numbers: row j of source k is due at time (2 j + 1) / (2 w_k), and rows
come in the order of their times. So any stretch of slots has each source's share to within
a row or two, the order of sources repeats after sum w_k slots, and the number of rows that
came from a source before any slot is known without counting them.

The epochs of a source do not depend on other sources. An epoch is a permutation of the
source's rows, which the seed, the number of the epoch and the source's place in the list
decide; it takes 8 bytes a row, and two are kept.

In continuous order, row i of a batch is followed by row i of the next batch, for
backpropagation truncated to a row with a carried state. Row i belongs to one source. The
rows of a source begin at places that divide it evenly, and each reads on to the end of the
source and then from its start.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma.training.packing import Batch, PackedTokens, as_batch

SHARES = 10_000
"""Weights are rounded to shares of one in so many."""
SHUFFLED, CONTINUOUS = "shuffled", "continuous"
ORDERS = (SHUFFLED, CONTINUOUS)
# A batch may end an epoch and begin the next.
_EPOCHS_KEPT = 2


class Mixture:
    """Batches of rows from one or several sources.

    Example:
        >>> from recurrentgemma.training.packing import PackedTokens
        >>> a, b = ([[2, *range(10 * n, 10 * n + 9), 1]] for n in (1, 2))
        >>> sources = [PackedTokens(a, 2), PackedTokens(b, 2)]
        >>> mixture = Mixture(sources, [3, 1], batch_size=4)
        >>> assert (mixture.batch(0).targets[:, 0] // 10).tolist() == [1, 1, 2, 1]

    Args:
      sources: rows of one length.
      weights: positive numbers, in proportion to which rows are taken; None takes
          those of the whole sources.
      batch_size: B.
      seed: seed of the shuffled order.
      order: "shuffled" or "continuous".
      digests: digest of the tokens of each file of each source, by their names.

    Raises:
      ValueError: a weight is not positive, the rows have several lengths, or a batch
          in continuous order has fewer rows than there are sources.
    """

    digests: dict[str, dict[str, str]]

    def __init__(
        self,
        sources: Sequence[PackedTokens],
        weights: Sequence[float] | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        order: str = SHUFFLED,
        digests: Mapping[str, Mapping[str, str]] | None = None,
    ):
        self.sources = tuple(sources)
        self.batch_size = check.positive_integer("batch_size", batch_size)
        self.order = check.choice("order", order, ORDERS)
        self.digests = {name: dict(files) for name, files in (digests or {}).items()}
        lengths = sorted({source.row_tokens for source in self.sources})
        if len(lengths) != 1:
            check.refuse("sources", "rows of one length", lengths)
        if weights is None:
            weights = [source.num_rows for source in self.sources]
        if len(weights) != len(self.sources):
            check.refuse("weights", f"one for each of {len(self.sources)}", weights)
        weights = [check.number("weights", weight, above=0) for weight in weights]
        shares = apportion(weights, SHARES)
        self._shares = shares // math.gcd(*shares.tolist())
        self._pattern = _by_time(self._shares, self._shares)
        self._rank = _ranks(self._pattern, len(self.sources))
        if order == CONTINUOUS:
            if batch_size < len(self.sources):
                raise ValueError(
                    f"batch_size: expected a row for each of {len(self.sources)} sources "
                    f"in continuous order, got {batch_size}; give larger batches"
                )
            self._lanes = apportion(weights, batch_size)
        self._orders = [
            functools.lru_cache(_EPOCHS_KEPT)(
                functools.partial(_permutation, source.num_rows, seed, number)
            )
            for number, source in enumerate(self.sources)
        ]

    @property
    def num_rows(self) -> int:
        """Number of rows of all sources."""
        return sum(source.num_rows for source in self.sources)

    def batch(self, step: int) -> Batch:
        """The batch of a step.

        Args:
          step: number of steps before this one.

        Returns:
          Arrays [B, T].
        """
        if self.order == CONTINUOUS:
            return self._gather(*self._continuous(step))
        slots = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        rounds, places = np.divmod(slots, len(self._pattern))
        which = self._pattern[places]
        numbers = rounds * self._shares[which] + self._rank[places]
        return self._gather(which, numbers, shuffled=True)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Every row once, in the sources' own order, mixed by their weights.

        The order is the same at each call, so that evaluations compare.

        Args:
          batch_size: number of rows of a batch; the last one is padded.
          limit: most batches; None yields them all.
        """
        sizes = np.array([source.num_rows for source in self.sources])
        which = _by_time(self._shares, sizes)
        rows = _ranks(which, len(sizes))
        padding = -len(rows) % batch_size
        which = np.append(which, np.zeros(padding, which.dtype))
        rows = np.append(rows, np.full(padding, sizes[0]))
        count = len(rows) // batch_size
        for index in range(count if limit is None else min(limit, count)):
            chosen = slice(index * batch_size, (index + 1) * batch_size)
            yield self._gather(which[chosen], rows[chosen])

    def _continuous(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        which = np.repeat(np.arange(len(self.sources)), self._lanes)
        rows = [
            (np.arange(lanes) * source.num_rows // lanes + step) % source.num_rows
            for source, lanes in zip(self.sources, self._lanes, strict=True)
        ]
        return which, np.concatenate(rows)

    def _gather(
        self, which: np.ndarray, rows: np.ndarray, *, shuffled: bool = False
    ) -> Batch:
        """These rows, each of the source of that number.

        Args:
          which: [B], the number of each row's source.
          rows: [B], the row's index; if shuffled, the number of rows that came from
              the source before.
          shuffled: whether the rows have the shuffled order.
        """
        windows: tuple[np.ndarray, ...] = ()
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(which == number)
            if not len(places):
                continue
            chosen = rows[places]
            if shuffled:
                chosen = self._shuffled(number, chosen)
            found = source.windows(chosen)
            if len(places) == len(which):
                return as_batch(*found)
            if not windows:
                windows = tuple(
                    np.empty((len(which), *column.shape[1:]), column.dtype)
                    for column in found
                )
            for column, part in zip(windows, found, strict=True):
                column[places] = part
        return as_batch(*windows)

    def _shuffled(self, number: int, rows: np.ndarray) -> np.ndarray:
        """Indices of the rows that a source gives at these, rising, times."""
        epochs, places = np.divmod(rows, self.sources[number].num_rows)
        parts = [
            self._orders[number](epoch)[places[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return np.concatenate(parts)


def apportion(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers in proportion to weights, at least 1 each, that sum to `total`.

    Args:
      weights: positive numbers, at most `total` of them.
      total: the sum.

    Returns:
      int64 [len(weights)].
    """
    exact = np.asarray(weights, float) / sum(weights) * total
    counts = np.maximum(exact.astype(int), 1)
    while (missing := total - counts.sum()) != 0:
        # One more where the most is missing, one less where the most is too much.
        change = exact - counts
        if missing < 0:
            change = np.where(counts > 1, change, np.inf)
        counts[change.argmax() if missing > 0 else change.argmin()] += np.sign(missing)
    return counts


def _by_time(shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The source of each slot, if source k has `sizes[k]` rows; at a tie the first."""
    times = [
        (2 * np.arange(size) + 1) / (2 * share)
        for share, size in zip(shares, sizes, strict=True)
    ]
    which = np.repeat(np.arange(len(sizes)), sizes)
    return which[np.argsort(np.concatenate(times), kind="stable")]


def _ranks(which: np.ndarray, count: int) -> np.ndarray:
    """How many slots before each one are of the same source."""
    ranks = np.empty(len(which), np.int64)
    for source in range(count):
        places = np.flatnonzero(which == source)
        ranks[places] = np.arange(len(places))
    return ranks


def _permutation(num_rows: int, seed: int, number: int, epoch: int) -> np.ndarray:
    # A last number of 0 changes nothing: the first source has the order it has alone.
    return np.random.default_rng([seed, epoch, number]).permutation(num_rows)
