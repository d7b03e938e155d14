"""Matrices quantised while they are loaded: int8 values, a scale for each channel.

    scale[o] = max_i |W[i, o]| / 127,      values[i, o] = round(W[i, o] / scale[o])

The matrices of linear layers have a scale for each output channel, the embedding one
for each token: a product sums over the other axis, so that it is taken with the values
and scaled afterwards. Gates, convolution, decays, norms and biases are left alone.

A tensor is read twice, slice by slice: for its largest magnitudes, and for its values.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from recurrentgemma.checkpoints import tensors as tensors_lib
from recurrentgemma.checkpoints.parameters import EMBEDDING, is_multiplied
from recurrentgemma.checkpoints.tensors import TensorSource, place
from recurrentgemma.config import GriffinConfig
from recurrentgemma.matrices import INT8_MAX, Quantized

SCHEMES = ("int8",)
"""What `load` can quantise to."""
VALUES, SCALES = "values", "scales"
"""Names of the arrays inside a quantised parameter."""


def quantizable(
    shapes: Mapping[str, tuple[int, ...]], config: GriffinConfig
) -> set[str]:
    """The names, among these parameters, of linear layers and of the embedding."""
    # The gates are block-diagonal: matrices of three axes.
    return {n for n, s in shapes.items() if len(s) == 2 and is_multiplied(n, config)}


def stored_quantized(names: Collection[str]) -> set[str]:
    """The parameters that a checkpoint with tensors of these names holds quantised."""
    return {
        name.removesuffix(f".{VALUES}") for name in names if name.endswith(f".{VALUES}")
    }


def stored_shapes(
    shapes: Mapping[str, tuple[int, ...]], quantized: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a checkpoint in which these parameters are quantised."""
    stored = {}
    for name, shape in shapes.items():
        if name in quantized:
            stored[f"{name}.{VALUES}"] = shape
            stored[f"{name}.{SCALES}"] = _scales_shape(name, shape)
        else:
            stored[name] = shape
    return stored


def place_quantized(
    name: str, source: TensorSource, sharding: jax.sharding.Sharding | None
) -> Quantized:
    """A tensor as int8 values and scales, on these devices.

    Args:
      name: of the parameter, native.
      source: the tensor, of a floating-point dtype; read twice.
      sharding: where the values go; the scales lie beside them.
    """
    scales = _scales_of(name, source)

    def read(start: int, stop: int) -> np.ndarray:
        part = source.read(start, stop).astype(np.float32)
        divisors = scales
        if scales.shape[source.axis] > 1:
            index = [slice(None), slice(None)]
            index[source.axis] = slice(start, stop)
            divisors = scales[tuple(index)]
        # A channel of zeros has the scale zero.
        ratio = np.divide(part, divisors, out=np.zeros_like(part), where=divisors > 0)
        return np.rint(ratio).astype(np.int8)

    values = TensorSource(source.shape, np.dtype(np.int8), source.axis, read)
    scales_source = TensorSource(
        scales.shape, scales.dtype, 0, lambda start, stop: scales[start:stop]
    )
    return _place(name, values, scales_source, sharding)


def place_stored(
    name: str,
    tensors: Mapping[str, TensorSource],
    sharding: jax.sharding.Sharding | None,
) -> Quantized:
    """A parameter that the checkpoint holds quantised, on these devices."""
    return _place(
        name, tensors[f"{name}.{VALUES}"], tensors[f"{name}.{SCALES}"], sharding
    )


def _place(name, values, scales, sharding):
    return Quantized(
        place(values, np.dtype(np.int8), sharding),
        place(scales, np.dtype(np.float32), _sharding_of_scales(name, sharding)),
    )


def _scales_of(name: str, source: TensorSource) -> np.ndarray:
    """float32 [1, out], or [V, 1] of an embedding."""
    summed = _summed_axis(name)
    largest = np.zeros(_scales_shape(name, source.shape), np.float32)
    length = source.shape[source.axis]
    row_bytes = source.shape[1 - source.axis] * source.dtype.itemsize
    step = max(1, tensors_lib.BLOCK_BYTES // row_bytes)
    for start in range(0, length, step):
        stop = min(start + step, length)
        part = np.abs(source.read(start, stop).astype(np.float32))
        part = part.max(axis=summed, keepdims=True)
        if source.axis == summed:
            np.maximum(largest, part, out=largest)
        else:
            index: list[Any] = [slice(None), slice(None)]
            index[source.axis] = slice(start, stop)
            largest[tuple(index)] = part
    return largest / np.float32(INT8_MAX)


def _scales_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    summed = _summed_axis(name)
    return tuple(1 if axis == summed else size for axis, size in enumerate(shape))


def _summed_axis(name: str) -> int:
    """The axis over which a product with the matrix sums."""
    return 1 if name.endswith(EMBEDDING) else 0


def _sharding_of_scales(name, sharding):
    if not isinstance(sharding, NamedSharding):
        return sharding
    parts = [*sharding.spec, None, None][:2]
    parts[_summed_axis(name)] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))
