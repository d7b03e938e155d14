"""What rows of tokens have in common at their beginning, as a tree: read once, forked.

Sorted rows that share a beginning are neighbours. A run of neighbours that share at
least `LEAST_SHARED` tokens more than all rows of their parent is a node:

    few-shot examples of a task
    ├── question 1: its choices are rows
    └── question 2: its choices are rows

The tree depends on the set of rows alone, not on their order.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

LEAST_SHARED = 16
"""Least number of tokens that are worth a call of the model."""

Rows = Sequence[Sequence[int]]
"""Token ids of each row."""


@dataclasses.dataclass(frozen=True)
class Node:
    """Rows that begin with the same tokens.

    Attributes:
      start: Number of those tokens that the parent shares already.
      stop: Number of tokens that all rows share.
      rows: Indices of the rows that go on alone from here.
      children: Nodes of rows that share more.
    """

    start: int
    stop: int
    rows: list[int]
    children: list["Node"]

    def any_row(self) -> int:
        """Index of one row of this node."""
        return self.rows[0] if self.rows else self.children[0].any_row()

    def nodes(self) -> "Iterator[Node]":
        """This node and all below it."""
        yield self
        for child in self.children:
            yield from child.nodes()


def shared_prefixes(
    rows: Rows, limits: Sequence[int], least: int = LEAST_SHARED
) -> Node:
    """The tree of shared beginnings.

    Args:
      rows: token ids of each row.
      limits: for each row, the number of tokens that it may share at most.
      least: least number of tokens of a node, at least 1.

    Returns:
      The root, which shares nothing: `start` and `stop` are 0.
    """
    heads = [tuple(row[:limit]) for row, limit in zip(rows, limits, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: (heads[i], tuple(rows[i])))
    # common[k]: how many tokens the k-th row in this order shares with the one before.
    common = [0] + [_common(heads[a], heads[b]) for a, b in itertools.pairwise(order)]

    def node(first: int, last: int, start: int, stop: int) -> Node:
        """Of the rows order[first:last], which all share `stop` tokens."""
        alone, children = [], []
        while first < last:
            end = first + 1
            while end < last and common[end] >= stop + least:
                end += 1
            if end - first == 1:
                alone.append(order[first])
            else:
                shared = min(common[first + 1 : end])
                children.append(node(first, end, stop, shared))
            first = end
        return Node(start, stop, alone, children)

    return node(0, len(rows), 0, 0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that two rows share at their beginning."""
    for count, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return count
    return min(len(a), len(b))
