"""The Mosaic GPU back end of the kernels for GPU, which jax makes Triton's successor.

A program is one warpgroup of 128 threads. Arrays stay in the device's memory as they
are, and a `View` is a program's part of one: the kernels index it like a ref of Triton's.

With jax 0.10.2 the linear scan and its gradient compile for an H100. Missing for the
RG-LRU: `log1p`, which this back end does not lower. Missing for older cards: the
compiler ends the process (it selects no elect.sync for sm_80); jax 0.7.2 lowers no
`layout_cast`. Nothing has run on a GPU.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from recurrentgemma.kernels.linear_scan.gpu_blocks import GpuBlocks
from recurrentgemma.kernels.linear_scan.gpu_programs import (
    PLAIN,
    Array,
    Before,
    PerChunk,
    Schedule,
    plain,
)

THREADS = 128
ARITHMETIC = PLAIN


def widen(blocks: GpuBlocks) -> GpuBlocks:
    """Blocks of one channel a thread, from those for programs of one warp."""
    programs = max(blocks.programs * min(blocks.channels) // THREADS, 1)
    return blocks._replace(channels=(THREADS,), programs=programs)


def full(channels: int, value: float) -> jax.Array:
    """See `Schedule.full`; laid out like what is loaded."""
    layout = mosaic_gpu.Layout.WG_STRIDED((channels,), vec_size=1)
    return mosaic_gpu.layout_cast(jnp.full([channels], value, jnp.float32), layout)


@dataclasses.dataclass(frozen=True)
class View:
    """A program's part of an array in memory.

    Attributes:
      ref: the whole array.
      place: function of the row of the part; the index in the array. Of a part without
        rows, the row is 0.
      ndim: number of dimensions of the part.
    """

    ref: Any
    place: Callable[[Any], tuple[Any, ...]]
    ndim: int

    @property
    def dtype(self) -> jnp.dtype:
        """That of the array."""
        return self.ref.dtype

    def __getitem__(self, index: Any) -> jax.Array:
        return self.ref[self.place(_row(index))]

    def __setitem__(self, index: Any, value: jax.Array) -> None:
        self.ref[self.place(_row(index))] = value


def _row(index: Any) -> Any:
    if index is Ellipsis:
        return 0
    return index[0] if isinstance(index, tuple) else index


def call(
    kernel: Callable[..., None],
    name: str,
    arrays: Sequence[Array],
    results: Sequence[Array],
    schedule: Schedule,
) -> list[jax.Array]:
    """See `gpu_programs.call`, for what the linear scan has; channels are whole blocks."""
    batch, _, width = plain(arrays[0]).shape
    kinds = [*arrays, *results]
    in_memory = pl.BlockSpec(memory_space=mosaic_gpu.GMEM)

    def run(*refs):
        kernel(
            *(
                _view(kind, ref, schedule, output=number >= len(arrays))
                for number, (kind, ref) in enumerate(zip(kinds, refs, strict=True))
            )
        )

    return pl.pallas_call(
        run,
        name=name,
        grid=(width // schedule.channels, batch, schedule.chunks),
        in_specs=[in_memory] * len(arrays),
        out_specs=[in_memory] * len(results),
        out_shape=list(map(plain, results)),
        # No array is both read and written: barriers around every store have no reason.
        compiler_params=mosaic_gpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=schedule.interpret,
    )(*map(plain, arrays))


def _view(kind: Array, ref: Any, schedule: Schedule, *, output: bool) -> View:
    block, batch, chunk = map(pl.program_id, range(3))
    channels = pl.ds(block * schedule.channels, schedule.channels)
    start = chunk * schedule.chunk
    match kind:
        case Before():
            before = jnp.maximum(start - 1, 0)
            return View(ref, lambda row: (batch, before, channels), 1)
        case PerChunk():
            if output:
                return View(ref, lambda row: (batch, chunk, channels), 1)
            return View(ref, lambda row: (batch, row, channels), 2)
    if len(ref.shape) == 2:
        return View(ref, lambda row: (batch, channels), 1)
    return View(ref, lambda row: (batch, start + row, channels), 2)
