"""Stored tensors that are read in slices, and their way to a dtype and devices.

A `TensorSource` is a tensor of a file or of a model, read a slice at a time along one
axis. `place` fills aligned host buffers of the target dtype slice by slice, one buffer
for each different shard, and hands them to the devices: the host never holds more than
the tensor and one slice, and on CPU the buffer itself becomes the array.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_BYTES = 1 << 20
"""Size of the slices that are read and converted; it fits a level-2 cache."""
BUFFER_ALIGNMENT = 64
"""Bytes; what XLA for CPU demands of memory that it takes over."""

EXPONENTS = {
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
    "float32": np.uint32(0x7F800000),
    "float64": np.uint64(0x7FF0000000000000),
}
"""Bits of the exponent."""


class TensorSource(NamedTuple):
    """A tensor that is read in slices."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int
    """The axis along which it is sliced."""
    read: Callable[[int, int], np.ndarray]
    """read(start, stop): the entries from start to stop along the axis."""

    def load(self) -> np.ndarray:
        """The whole tensor."""
        return self.read(0, self.shape[self.axis])

    def transposed(self) -> "TensorSource":
        """The tensor with its axes in reverse order."""
        return TensorSource(
            self.shape[::-1],
            self.dtype,
            len(self.shape) - 1 - self.axis,
            lambda start, stop: self.read(start, stop).T,
        )

    def reshaped(self, shape: tuple[int, ...], axis: int) -> "TensorSource":
        """The tensor in a shape that adds or removes axes of size 1."""

        def read(start: int, stop: int) -> np.ndarray:
            part = [*shape]
            part[axis] = stop - start
            return self.read(start, stop).reshape(part)

        return TensorSource(shape, self.dtype, axis, read)

    def astype(self, dtype: np.dtype, name: str = "the tensor") -> "TensorSource":
        """The tensor converted to a dtype, slice by slice.

        Reading raises ValueError, which calls the tensor `name`, where a finite value
        would become infinite.
        """
        if dtype == self.dtype:
            return self

        def read(start: int, stop: int) -> np.ndarray:
            part = self.read(start, stop)
            with np.errstate(over="ignore"):
                converted = part.astype(dtype)
            if not is_finite(converted) and is_finite(part):
                raise ValueError(
                    f"dtype: {dtype} cannot hold the values of {name}, which go up to "
                    f"{np.abs(part).max():.3g}; use bfloat16 or float32."
                )
            return converted

        return TensorSource(self.shape, dtype, self.axis, read)

    def watched(self, see: Callable[[int, np.ndarray], None]) -> "TensorSource":
        """The tensor, each part of which is shown to see(start, part) when it is read."""

        def read(start: int, stop: int) -> np.ndarray:
            part = self.read(start, stop)
            see(start, part)
            return part

        return self._replace(read=read)

    def entry(self, index: int) -> "TensorSource":
        """An entry of the first axis, which is not the one that is sliced."""
        return TensorSource(
            self.shape[1:],
            self.dtype,
            self.axis - 1,
            lambda start, stop: self.read(start, stop)[index],
        )

    def stacked(self, other: "TensorSource") -> "TensorSource":
        """This and another of the same shape, dtype and axis, on a new first axis."""
        return TensorSource(
            (2, *self.shape),
            self.dtype,
            self.axis + 1,
            lambda start, stop: np.stack(
                [self.read(start, stop), other.read(start, stop)]
            ),
        )


def file_source(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, axis: int = 0
) -> TensorSource:
    """A source for a tensor that lies in a file in C order.

    Entries are read, not mapped: mapped pages count as memory of the process.

    Args:
      path: the file.
      offset: where in the file the tensor begins, in bytes.
      shape: its shape.
      dtype: its dtype.
      axis: the axis along which it is read in slices.
    """
    count = math.prod(shape[:axis])
    entry_bytes = math.prod(shape[axis + 1 :]) * dtype.itemsize

    def read(start: int, stop: int) -> np.ndarray:
        parts = np.empty((count, (stop - start) * entry_bytes), np.uint8)
        with path.open("rb", buffering=0) as file:
            for i, part in enumerate(parts):
                file.seek(offset + (i * shape[axis] + start) * entry_bytes)
                view = part.data
                while view:
                    size = file.readinto(view)
                    if not size:
                        raise ValueError(f"{path} was truncated while it was read.")
                    view = view[size:]
        part_shape = (*shape[:axis], stop - start, *shape[axis + 1 :])
        return parts.reshape(-1).view(dtype).reshape(part_shape)

    return TensorSource(shape, dtype, axis, read)


def floating_dtype(dtype: Any, argument: str) -> np.dtype:
    """A dtype that tensors can be stored in.

    Raises:
      ValueError: it is another one; the message names the argument.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in EXPONENTS:
        raise ValueError(
            f"{argument}: expected one of {', '.join(EXPONENTS)}, got {dtype!r}."
        )
    return found


def is_finite(array: np.ndarray) -> bool:
    """Whether every value is finite: no exponent has all bits set."""
    mask = EXPONENTS[array.dtype.name]
    bits = array.view(mask.dtype)
    return not np.any((bits & mask) == mask)


def blocks_of(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order, in blocks of rows.

    A transposed array is never copied whole.
    """
    step = max(1, BLOCK_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        rows = np.ascontiguousarray(array[start : start + step])
        yield rows.view(np.uint8).data


def array_source(array: jax.Array, index: int | None = None) -> TensorSource:
    """A source for a parameter, or for entry `index` of a stacked one.

    Raises:
      ValueError: parts of the array are on devices of other processes.
    """
    if not array.is_fully_addressable:
        raise ValueError(
            "The model is spread over several processes: gather it on one of them "
            "before saving."
        )
    shape = array.shape if index is None else array.shape[1:]

    def read(start: int, stop: int) -> np.ndarray:
        return _to_host(array if index is None else array[index])[start:stop]

    return TensorSource(shape, np.dtype(array.dtype), 0, read)


def _to_host(array: jax.Array) -> np.ndarray:
    on_cpu = next(iter(array.devices())).platform == "cpu"
    if on_cpu and len(array.devices()) == 1:
        return np.asarray(array)  # A view.
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            # An array keeps the host copy that it is asked for, which would add up to
            # the whole model; a copy of the array takes it along.
            data = shard.data if on_cpu else jnp.copy(shard.data)
            whole[shard.index] = np.asarray(data)
    return whole


def place(
    source: TensorSource, dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """The tensor as an array of this dtype, on these devices.

    Args:
      source: the tensor to read.
      dtype: the dtype of the result.
      sharding: where it goes; None is the default device, uncommitted.

    Returns:
      The array, whose transfer has ended.
    """
    if sharding is None:
        buffer = aligned_empty(source.shape, dtype)
        _fill(source, [(_whole(source.shape), buffer)])
        return jax.block_until_ready(jax.device_put(buffer))
    devices_by_index: dict[tuple, list[Any]] = {}
    index_map = sharding.addressable_devices_indices_map(source.shape)
    for device, slices in index_map.items():
        index = tuple(
            s.indices(n)[:2] for s, n in zip(slices or (), source.shape, strict=True)
        )
        devices_by_index.setdefault(index, []).append(device)
    shards = [
        (index, aligned_empty([stop - start for start, stop in index], dtype))
        for index in devices_by_index
    ]
    _fill(source, shards)
    arrays = [
        jax.device_put(buffer, device)
        for index, buffer in shards
        for device in devices_by_index[index]
    ]
    return jax.block_until_ready(
        jax.make_array_from_single_device_arrays(source.shape, sharding, arrays)
    )


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that XLA for CPU can use without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + BUFFER_ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % BUFFER_ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _whole(shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((0, n) for n in shape)


def _fill(
    source: TensorSource, shards: list[tuple[tuple[tuple[int, int], ...], np.ndarray]]
) -> None:
    """Reads the source once, block by block, into all shards that a block touches."""
    axis = source.axis
    first = min(index[axis][0] for index, _ in shards)
    last = max(index[axis][1] for index, _ in shards)
    row_bytes = math.prod(source.shape) // source.shape[axis] * source.dtype.itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(first, last, step):
        stop = min(start + step, last)
        block = source.read(start, stop)
        for index, buffer in shards:
            low, high = max(start, index[axis][0]), min(stop, index[axis][1])
            if low >= high:
                continue
            from_block = [slice(*bounds) for bounds in index]
            from_block[axis] = slice(low - start, high - start)
            into_buffer = [slice(None)] * buffer.ndim
            into_buffer[axis] = slice(low - index[axis][0], high - index[axis][0])
            np.copyto(
                buffer[tuple(into_buffer)], block[tuple(from_block)], casting="unsafe"
            )
