"""Block shapes of the recurrence kernels for TPU: a few numbers and one pure function."""

import math
from typing import NamedTuple

LANES = 128
"""Channels of a tile."""
MAX_WIDTH = 4096
"""Channels of a block: the state of more would not stay in registers."""
ROW_CHANNELS = 4096
"""Channels advanced at once, over the rows of a block: enough independent chains of
dependent steps to hide their latency, few enough to stay in registers."""
VMEM_BUDGET_BYTES = 10 * 2**20
"""For the double buffers of all blocked arrays; the default limit of a kernel is 16 MiB."""
MAX_STEPS = 512


class BlockSizes(NamedTuple):
    """A block of [B, T, D] is [rows, steps, width]."""

    rows: int
    steps: int
    width: int
    group: int
    """Steps handled at once: the height of a tile of the narrowest dtype."""


def block_sizes(shape: tuple[int, ...], itemsizes: tuple[int, ...]) -> BlockSizes:
    """Block sizes for some arrays [B, T, D] of one shape.

    Args:
      shape: B, T and D.
      itemsizes: bytes an element of each array that is read or written in blocks.
    """
    batch, length, width = shape
    group = min(length, 32 // min(itemsizes))
    parts = math.ceil(width / MAX_WIDTH)
    block_width = width
    if parts > 1:
        block_width = math.ceil(width / parts / LANES) * LANES
    rows = math.gcd(batch, 8)
    while rows > 1 and rows * block_width > ROW_CHANNELS:
        rows //= 2
    per_step = 2 * rows * math.ceil(block_width / LANES) * LANES * sum(itemsizes)
    fitting = max(VMEM_BUDGET_BYTES // per_step, group)
    steps = min(2 ** int(math.log2(fitting)), MAX_STEPS)
    return BlockSizes(
        rows=rows,
        steps=min(steps, math.ceil(length / group) * group),
        width=block_width,
        group=group,
    )
