"""Block choices of the recurrence kernels for GPU: the rows of `gpu_blocks.json`.

A row is for a kernel, the compute capability that it was measured on (null is every
other one) and the bytes of the widest element. `recurrentgemma bench gpu_blocks` times
candidates on a GPU and writes such rows. Those for every other card are not measured:
they are what fits the registers, by the compiler's report.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recurrentgemma.kernels import gpu

FILE = Path(__file__).with_name("gpu_blocks.json")
KERNELS = ("linear_scan", "linear_scan_gradient", "rg_lru", "rg_lru_gradient")


class GpuBlocks(NamedTuple):
    """How sequences [B, T, D] are cut into programs of one warp.

    Attributes:
      channels: numbers of channels of a program, the best first; the later ones are for
        sequences of which the first would make too few programs. 32 is one channel for
        each thread, and 4 bytes a thread are one load.
      programs: number of programs that fill the chip.
      shortest_chunk: number of steps below which a chunk is not worth its summary.
      unroll: number of steps of a group, whose inputs are in flight together.
    """

    channels: tuple[int, ...]
    programs: int
    shortest_chunk: int
    unroll: int


INTERPRETED = {"unroll": 2, "programs": 8}
"""Interpreted, long code takes long to compile, and a state that it computes twice may
be rounded in two ways; programs run one after another."""


def find(kernel: str, arrays: Sequence[Any], interpret: bool) -> GpuBlocks:
    """The blocks of a kernel of `KERNELS` for these sequences on the GPU that is here."""
    itemsize = max(array.dtype.itemsize for array in arrays)
    rows = _rows()
    blocks = rows.get((kernel, gpu.capability(), itemsize))
    blocks = blocks or rows[kernel, None, itemsize]
    return blocks._replace(**INTERPRETED) if interpret else blocks


@functools.cache
def _rows() -> dict[tuple[str, tuple[int, int] | None, int], GpuBlocks]:
    return dict(map(from_row, json.loads(FILE.read_text(encoding="utf-8"))))


def from_row(row: dict[str, Any]) -> tuple[tuple[Any, ...], GpuBlocks]:
    """The key and the blocks of a row of the file."""
    capability = row["capability"] and tuple(row["capability"])
    blocks = GpuBlocks(**{name: row[name] for name in GpuBlocks._fields})
    blocks = blocks._replace(channels=tuple(blocks.channels))
    return (row["kernel"], capability, row["itemsize"]), blocks


def to_text(found: dict[tuple[str, tuple[int, int], int], GpuBlocks]) -> str:
    """The file with these blocks, by kernel, capability and itemsize, beside its own."""
    rows = [
        {"kernel": kernel, "capability": capability, "itemsize": itemsize}
        | blocks._asdict()
        for (kernel, capability, itemsize), blocks in (_rows() | found).items()
    ]
    return "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n"
