"""What the kernels for TPU know of the chip that a program is for.

A mesh names its devices, those of a topology that is not here too, and so it reaches
the kernels under ahead-of-time compilation and inside `shard_map`. Without a mesh
nothing tells for which chip a program is traced: kernels then take what runs on every
generation from v4 on.
"""

from typing import NamedTuple

import jax

from recurrentgemma.kernels import meshes


class Chip(NamedTuple):
    """What the blocks of a kernel depend on."""

    cores: int = 1
    """Number of TensorCores that share the parallel axes of a grid: 2 where JAX shows
    both cores of a chip of v4 or v5p as one device."""
    spills_much: bool = False
    """Whether the compiler needs as much on-chip memory again for spilled registers as
    the arrays of a kernel with matrix products take."""


UNKNOWN = Chip()
"""Where no mesh tells."""
SPILLS_MUCH = ("TPU v2", "TPU v3")
"""`device_kind`s of such chips."""


def chip_of(*arrays: jax.Array) -> Chip:
    """The chip for which a program with these arrays is traced."""
    device = meshes.current_mesh(arrays).abstract_device
    if device is None:
        return UNKNOWN
    return Chip(device.num_cores or 1, device.device_kind in SPILLS_MUCH)
