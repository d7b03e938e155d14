"""The Triton back end of the kernels for GPU; it wants compute capability 8.0.

All that is particular to it is here. A program is one warp.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from recurrentgemma.kernels.linear_scan.gpu_blocks import GpuBlocks
from recurrentgemma.kernels.linear_scan.gpu_programs import (
    Arithmetic,
    Array,
    Before,
    PerChunk,
    PerStep,
    Schedule,
    plain,
)


def _instruction(name):
    def run(*arrays):
        shape = jnp.broadcast_shapes(*map(jnp.shape, arrays))
        results = triton.elementwise_inline_asm(
            f"{name} {', '.join(f'${i}' for i in range(len(arrays) + 1))};",
            args=[jnp.broadcast_to(jnp.float32(array), shape) for array in arrays],
            constraints=",".join(["=f", *["f"] * len(arrays)]),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
        )
        return results[0]

    return run


ARITHMETIC = Arithmetic(
    multiply_add=_instruction("fma.rn.f32"),
    exp2=_instruction("ex2.approx.ftz.f32"),
    reciprocal=_instruction("rcp.approx.ftz.f32"),
    rsqrt=_instruction("rsqrt.approx.ftz.f32"),
)
"""Triton itself fuses no product with a sum and takes nine for an exponential, which
doubles the recurrent unit's. They err by two units in the last place at most."""


def widen(blocks: GpuBlocks) -> GpuBlocks:
    """The blocks themselves, which are made for programs of one warp."""
    return blocks


def full(channels: int, value: float) -> jax.Array:
    """See `Schedule.full`."""
    return jnp.full([channels], value, jnp.float32)


def call(
    kernel: Callable[..., None],
    name: str,
    arrays: Sequence[Array],
    results: Sequence[Array],
    schedule: Schedule,
) -> list[jax.Array]:
    """See `gpu_programs.call`; channels are whole blocks."""
    batch, _, width = plain(arrays[0]).shape
    chunk, chunks, channels = schedule.chunk, schedule.chunks, schedule.channels

    def of_sequence(rows, index):
        return pl.BlockSpec((None, rows, channels), lambda d, b, c: (b, index(c), d))

    def spec(array, output):
        match array:
            case Before():
                return of_sequence(None, lambda c: jnp.maximum(c * chunk - 1, 0))
            case PerStep():
                return pl.BlockSpec((None, chunk), lambda d, b, c: (b, c))
            case PerChunk():
                if output:
                    return of_sequence(None, lambda c: c)
                return of_sequence(chunks, lambda c: 0)
        match len(array.shape):
            case 1:
                return pl.BlockSpec((channels,), lambda d, b, c: (d,))
            case 2:
                return pl.BlockSpec((None, channels), lambda d, b, c: (b, d))
        return of_sequence(chunk, lambda c: c)

    return pl.pallas_call(
        kernel,
        name=name,
        grid=(width // channels, batch, chunks),
        in_specs=[spec(array, False) for array in arrays],
        out_specs=[spec(result, True) for result in results],
        out_shape=list(map(plain, results)),
        compiler_params=triton.CompilerParams(num_warps=1),
        interpret=schedule.interpret,
    )(*map(plain, arrays))
