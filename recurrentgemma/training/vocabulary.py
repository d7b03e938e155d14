"""How the loss lies on a mesh: each device has a part of the tokens and of the pieces.

Devices along an axis that cuts channels have the same tokens and different pieces of the
vocabulary. Along `fsdp` tokens and parameters are cut: there each block of tokens is
gathered, so that every device meets all of them with its own pieces, and no device holds
the whole embedding or its gradient. Along the other axes the gradients are added, once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from recurrentgemma.kernels import meshes


class Parts(NamedTuple):
    """The mesh axes along which the loss is cut; none at all is one device."""

    mesh: AbstractMesh | None = None
    rows: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    pieces: tuple[str, ...] = ()

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes along which tokens are gathered, because they cut pieces too."""
        return tuple(axis for axis in self.rows if axis in self.pieces)

    @property
    def num_gathered(self) -> int:
        """Number of devices whose tokens are gathered."""
        return self._count(self.gathered)

    @property
    def num_pieces(self) -> int:
        """Number of devices that have different pieces."""
        return self._count(self.pieces)

    def _count(self, axes):
        return math.prod(self.mesh.shape[axis] for axis in axes) if self.mesh else 1

    @property
    def added(self) -> tuple[str, ...]:
        """Axes along which devices have different tokens for the same pieces."""
        return tuple(a for a in (*self.rows, *self.time) if a not in self.pieces)

    def run(self, function: Callable[..., Any], results: str, *arguments: Any) -> Any:
        """A function on each device's part.

        Args:
          function: of an embedding [V, D] and of arrays [B, T, ...].
          results: what each of its results is: "s" a scalar, the same on all devices,
              "t" an array [B, T, ...], "e" one like the embedding.
          *arguments: its arguments.
        """
        if self.mesh is None:
            return function(*arguments)
        embedding = PartitionSpec(self.pieces or None)
        tokens = PartitionSpec(self.rows or None, self.time or None)
        specs = {"s": PartitionSpec(), "t": tokens, "e": embedding}
        run = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(embedding, *[tokens] * (len(arguments) - 1)),
            out_specs=tuple(map(specs.__getitem__, results)),
            axis_names=set(meshes.axes_of_type(self.mesh, jax.sharding.AxisType.Auto)),
            check_vma=False,
        )
        return jax.jit(run)(*arguments)

    def gather(self, array: jax.Array) -> jax.Array:
        """[B, ...] of this device -> that of all devices with other pieces."""
        if not self.gathered:
            return array
        return jax.lax.all_gather(array, self.gathered, axis=0, tiled=True)

    def own_rows(self, array: jax.Array, axis: int) -> jax.Array:
        """The inverse of `gather`, along an axis."""
        if not self.gathered:
            return array
        size = array.shape[axis] // self.num_gathered
        start = jax.lax.axis_index(self.gathered) * size
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

    def add_pieces(self, array: jax.Array) -> jax.Array:
        """[B, ...], a sum over pieces of all gathered rows -> that of this device."""
        others = tuple(axis for axis in self.pieces if axis not in self.gathered)
        if others:
            array = jax.lax.psum(array, others)
        if not self.gathered:
            return array
        return jax.lax.psum_scatter(array, self.gathered, tiled=True)

    def add_tokens(self, array: jax.Array) -> jax.Array:
        """A sum over the tokens of this device -> over all tokens."""
        return jax.lax.psum(array, self.added) if self.added else array

    def logsumexp(self, logits: jax.Array) -> jax.Array:
        """[B, t, V] -> [B, t], over the pieces of all devices."""
        own = jax.nn.logsumexp(logits, axis=-1)
        if not self.pieces:
            return own
        largest = jax.lax.pmax(own, self.pieces)
        return largest + jnp.log(jax.lax.psum(jnp.exp(own - largest), self.pieces))

    def first_piece(self, count: int) -> jax.Array | int:
        """The first of the `count` pieces of this device."""
        return jax.lax.axis_index(self.pieces) * count if self.pieces else 0

    def take(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """The logit [B, t] of each target [B, t]; logits are [B, t, V]."""
        if not self.pieces:
            return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        local = targets - self.first_piece(logits.shape[-1])
        is_here = (local >= 0) & (local < logits.shape[-1])
        index = jnp.where(is_here, local, 0)[..., None]
        found = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
        return jax.lax.psum(jnp.where(is_here, found, 0), self.pieces)


def parts_of(embedding: jax.Array, hidden: jax.Array) -> Parts:
    """The parts of a loss under the current mesh.

    Args:
      embedding: [V, D].
      hidden: [B, T, D].
    """
    mesh = meshes.current_mesh([hidden, embedding])
    batch_size, length, _ = hidden.shape
    rows = meshes.dividing_axes(mesh, "rows", [batch_size])
    time = meshes.dividing_axes(mesh, "time", [length])
    pieces, devices = (), 1
    for axis in meshes.axes_of_type(mesh, jax.sharding.AxisType.Auto):
        of_parameters = axis in rows and axis in meshes.PARAMETER_AXES
        of_channels = meshes.AXIS_ROLES.get(axis) == "channels" and mesh.shape[axis] > 1
        divides = len(embedding) % (devices * mesh.shape[axis]) == 0
        if (of_parameters or of_channels) and divides:
            pieces, devices = (*pieces, axis), devices * mesh.shape[axis]
    return Parts(mesh, rows, time, pieces) if rows or time or pieces else Parts()
