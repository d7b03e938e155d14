"""The tree of shared beginnings: every row once, nothing shared left out."""

import itertools

import hypothesis
from hypothesis import strategies

from recurrentgemma.evaluation.shared_prefixes import Node, shared_prefixes

ROWS = strategies.lists(
    strategies.lists(strategies.integers(0, 1), min_size=1, max_size=12), max_size=9
)


def paths(node: Node, above=()):
    """Each row with the nodes it is below, root first."""
    line = (*above, node)
    for row in node.rows:
        yield row, line
    for child in node.children:
        yield from paths(child, line)


def shape(node: Node, rows):
    """The tree, by tokens instead of indices."""
    alone = sorted(tuple(rows[i]) for i in node.rows)
    children = sorted(shape(child, rows) for child in node.children)
    return node.start, node.stop, alone, children


@hypothesis.given(ROWS, strategies.integers(1, 4), strategies.randoms())
@hypothesis.settings(deadline=None, max_examples=200)
def test_tree(rows, least, random):
    limits = [random.randint(0, len(row)) for row in rows]
    tree = shared_prefixes(rows, limits, least)
    found = list(paths(tree))
    assert sorted(row for row, _ in found) == list(range(len(rows)))
    for row, line in found:
        assert line[-1].stop <= limits[row]
        for parent, child in itertools.pairwise(line):
            assert child.start == parent.stop and child.stop >= parent.stop + least
            shared = rows[row][: child.stop]
            assert rows[child.any_row()][: child.stop] == shared
    for (a, line), (b, other) in itertools.combinations(found, 2):
        common = list(
            itertools.takewhile(
                lambda pair: pair[0] == pair[1],
                zip(rows[a][: limits[a]], rows[b][: limits[b]], strict=False),
            )
        )
        together = [x for x, y in zip(line, other, strict=False) if x is y]
        assert len(common) < together[-1].stop + least, "two rows share more"
    for node in tree.nodes():
        below = [row for row, line in found if node in line]
        assert node is tree or len(below) >= 2, "read for one row alone"


def test_the_order_of_rows_does_not_matter():
    shots = [[7] * 20, [8] * 20]
    rows = [
        [*shot, *question, choice]
        for shot in shots
        for question in ([1] * 5, [1, 2, 3, 4, 5], [2] * 5)
        for choice in (5, 6)
    ]
    limits = [len(row) - 1 for row in rows]
    tree = shared_prefixes(rows, limits, 3)
    assert [(n.start, n.stop, len(n.rows), len(n.children)) for n in tree.nodes()] == [
        (0, 0, 0, 2),
        *[(0, 20, 0, 3), *[(20, 25, 2, 0)] * 3] * 2,
    ]
    backwards = rows[::-1]
    assert shape(shared_prefixes(backwards, limits, 3), backwards) == shape(tree, rows)
