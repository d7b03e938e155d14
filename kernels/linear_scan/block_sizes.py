"""Block shapes of the recurrence kernels for TPU: a few numbers and one pure function."""

import math
from collections.abc import Sequence
from typing import NamedTuple

LANES = 128
"""Channels of a tile."""
TILE = 8
"""Rows of a float32 tile."""
MAX_WIDTH = 4096
"""Channels of a block: the state of more would not stay in registers."""
ROW_CHANNELS = 4096
"""Channels advanced at once, over the rows of a block: enough independent chains of
dependent steps to hide their latency, few enough to stay in registers."""
VMEM_BUDGET_BYTES = 10 * 2**20
"""For the double buffers of all blocked arrays. All kernels keep to 16 MiB, which is what
TPU v4 has: nothing tells a kernel for which generation it is compiled."""
GATES_BUDGET_BYTES = 14 * 2**20
"""For all arrays of a kernel with gate products; spilled registers take the rest. On TPU v2
and v3, which spill several MiB, the gradient's kernel does not fit at the 2B model's size."""
FORWARD_ARRAYS, GRADIENT_ARRAYS = (2, 2), (4, 6)
"""Sequences that these kernels read or write, and float32 arrays as large as a block."""
MAX_STEPS = 512


class Blocks(NamedTuple):
    """How sequences [B, T, D] are cut into blocks [rows, steps, width]."""

    rows: int
    steps: int
    width: int
    group: int
    """Steps handled at once: the height of a tile of the narrowest dtype."""
    length: int
    """T."""
    reverse: bool
    """Whether time runs from the last step to the first."""


def block_sizes(
    shape: tuple[int, ...], itemsizes: Sequence[int], *, reverse: bool = False
) -> Blocks:
    """Blocks of some arrays [B, T, D] of one shape.

    Args:
      shape: B, T and D.
      itemsizes: bytes an element of each array that is read or written in blocks.
      reverse: whether time runs from the last step to the first.
    """
    batch, length, width = shape
    group = min(length, 32 // min(itemsizes))
    parts = math.ceil(width / MAX_WIDTH)
    if parts > 1:
        width = math.ceil(width / parts / LANES) * LANES
    rows = math.gcd(batch, 8)
    while rows > 1 and rows * width > ROW_CHANNELS:
        rows //= 2
    per_step = 2 * rows * math.ceil(width / LANES) * LANES * sum(itemsizes)
    fitting = max(VMEM_BUDGET_BYTES // per_step, group)
    steps = min(2 ** int(math.log2(fitting)), MAX_STEPS)
    steps = min(steps, math.ceil(length / group) * group)
    return Blocks(rows, steps, width, group, length, reverse)


def gate_block_sizes(
    shape: tuple[int, ...],
    gate_width: int,
    itemsize: int,
    *,
    gradient: bool,
) -> Blocks | None:
    """Blocks for a kernel with the RG-LRU's gate products; None if none fit.

    A block has whole gate blocks. Fewer rows, then fewer channels, then fewer steps are
    taken until a block fits: products of fewer than 128 steps fill the matrix units less.
    (At (8, 2048, 2560) in bfloat16 half the channels cost the gradient 6 % more cycles on
    v5e by the compiler's estimate, half the steps 30 %.)

    Args:
      shape: B, T and E.
      gate_width: channels of a gate block, a divisor of E.
      itemsize: bytes of an element of the sequences and of the gates' matrices.
      gradient: whether it is the kernel of the gradient.
    """
    sequences, wide = GRADIENT_ARRAYS if gradient else FORWARD_ARRAYS
    first = block_sizes(shape, (itemsize,) * sequences, reverse=gradient)

    def fits(blocks: Blocks) -> bool:
        per_step = blocks.rows * (2 * sequences * itemsize + 4 * wide)
        matrices = 2 * gate_width * (itemsize + 4 * blocks.rows * gradient)
        size = blocks.width * (blocks.steps * per_step + matrices)
        return size <= GATES_BUDGET_BYTES

    groups = shape[2] // gate_width
    whole_length = math.ceil(shape[1] / first.group) * first.group
    candidates = (
        first._replace(rows=rows, steps=steps, width=count * gate_width)
        for steps in _halvings(min(whole_length, LANES, MAX_STEPS), first.group)
        for count in range(min(groups, MAX_WIDTH // gate_width), 0, -1)
        if groups % count == 0
        for rows in _halvings(first.rows, 1)
    )
    return next(filter(fits, candidates), None)


def _halvings(size: int, smallest: int) -> list[int]:
    """The size, its half, ..., in multiples of `smallest`."""
    sizes = [size]
    while sizes[-1] > smallest:
        sizes.append(-(-sizes[-1] // (2 * smallest)) * smallest)
    return sizes
