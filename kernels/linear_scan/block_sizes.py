"""Block shapes of the recurrence kernels for TPU: a few numbers and one pure function."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from recurrentgemma.kernels.tpu_chips import UNKNOWN, Chip

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
"""For the double buffers of all blocked arrays. All kernels keep to 16 MiB, the on-chip
memory of TPU v2 to v4."""
GATES_BUDGET_BYTES = 14 * 2**20
"""For all arrays of a kernel with gate products; spilled registers take the rest."""
SMALL_GATES_BUDGET_BYTES = 8 * 2**20
"""The same for a `Chip` that `spills_much`."""
FEW_PROGRAMS = 8
"""Number of programs up to which an odd one on two cores costs more than a finer cut."""
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
    shape: tuple[int, ...],
    itemsizes: Sequence[int],
    *,
    reverse: bool = False,
    chip: Chip = UNKNOWN,
) -> Blocks:
    """Blocks of some arrays [B, T, D] of one shape.

    Where the cores of the chip would get unequal shares, blocks have half the rows, and
    of a single row half the channels. (A core alone would take up to 31 % more cycles for
    narrower blocks, by the compiler's estimates, two take 13 to 43 % fewer.)

    Args:
      shape: B, T and D.
      itemsizes: bytes an element of each array that is read or written in blocks.
      reverse: whether time runs from the last step to the first.
      chip: what runs the kernel.
    """
    batch, length, channels = shape
    group = min(length, 32 // min(itemsizes))
    width, parts = _equal_parts(channels, math.ceil(channels / MAX_WIDTH))
    rows = math.gcd(batch, 8)
    while rows > 1 and rows * width > ROW_CHANNELS:
        rows //= 2

    def share(rows, parts):
        return largest_share(parts * (batch // rows), chip.cores)

    if rows > 1 and share(rows // 2, parts) < share(rows, parts):
        rows //= 2
    halved, more = _equal_parts(channels, chip.cores * parts)
    if share(rows, more) < share(rows, parts):
        width = halved
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
    chip: Chip = UNKNOWN,
) -> Blocks | None:
    """Blocks for a kernel with the RG-LRU's gate products; None if none fit.

    A block has whole gate blocks. Fewer rows, then fewer channels, then fewer steps are
    taken until a block fits: products of fewer than 128 steps fill the matrix units less.
    (At (8, 2048, 2560) in bfloat16 half the channels cost the gradient 6 % more cycles on
    v5e by the compiler's estimate, half the steps 30 %.) Of the blocks that fit, the
    first is taken that leaves no core of the chip with a larger share than need be.

    Args:
      shape: B, T and E.
      gate_width: channels of a gate block, a divisor of E.
      itemsize: bytes of an element of the sequences and of the gates' matrices.
      gradient: whether it is the kernel of the gradient.
      chip: what runs the kernel.
    """
    budget = SMALL_GATES_BUDGET_BYTES if chip.spills_much else GATES_BUDGET_BYTES
    sequences, wide = GRADIENT_ARRAYS if gradient else FORWARD_ARRAYS
    first = block_sizes(shape, (itemsize,) * sequences, reverse=gradient)

    def fits(blocks: Blocks) -> bool:
        per_step = blocks.rows * (2 * sequences * itemsize + 4 * wide)
        matrices = 2 * gate_width * (itemsize + 4 * blocks.rows * gradient)
        size = blocks.width * (blocks.steps * per_step + matrices)
        return size <= budget

    def share(blocks: Blocks) -> float:
        programs = (shape[0] // blocks.rows) * (shape[2] // blocks.width)
        return largest_share(programs, chip.cores)

    groups = shape[2] // gate_width
    whole_length = math.ceil(shape[1] / first.group) * first.group
    candidates = (
        first._replace(rows=rows, steps=steps, width=count * gate_width)
        for steps in _halvings(min(whole_length, LANES, MAX_STEPS), first.group)
        for count in range(min(groups, MAX_WIDTH // gate_width), 0, -1)
        if groups % count == 0
        for rows in _halvings(first.rows, 1)
    )
    return min(filter(fits, candidates), key=share, default=None)


def largest_share(programs: int, cores: int) -> float:
    """Share of the work of the core that gets most of the programs of a grid."""
    if programs > FEW_PROGRAMS:
        return 1 / cores
    return math.ceil(programs / cores) / programs


def _equal_parts(channels: int, parts: int) -> tuple[int, int]:
    """Width of a block of channels, whole tiles of lanes, and the number of blocks."""
    if parts == 1:
        return channels, 1
    width = math.ceil(channels / parts / LANES) * LANES
    return width, math.ceil(channels / width)


def _halvings(size: int, smallest: int) -> list[int]:
    """The size, its half, ..., in multiples of `smallest`."""
    sizes = [size]
    while sizes[-1] > smallest:
        sizes.append(-(-sizes[-1] // (2 * smallest)) * smallest)
    return sizes
