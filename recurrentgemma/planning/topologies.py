"""TPU topologies that the compiler knows, and what is published of their chips.

A topology is a generation and the shape of a slice, such as `v5e:4x4`.
"""

import importlib.util
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recurrentgemma.training.mesh import filled_axes
from recurrentgemma.training.sharding import BATCH


class Chip(NamedTuple):
    """A chip, as its documentation describes it.

    Attributes:
      flops_per_s: Peak rate of bfloat16 products.
      memory_bytes_per_s: Bandwidth of its memory.
      link_bytes_per_s: Bandwidth of its links to other chips, all together.
      largest: Number of chips of the largest slice.
      source: Where these figures are published.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    largest: int
    source: str


CHIPS = {
    "v5e": Chip(197e12, 819e9, 1600e9 / 8, 256, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 2765e9, 4800e9 / 8, 8960, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 1600e9, 3200e9 / 8, 256, "cloud.google.com/tpu/docs/v6e"),
}
"""Chips by generation: those of which JAX sees one device."""
_SHAPES = {"v5e": 2, "v5p": 3, "v6e": 2}
"""Number of dimensions of a slice."""
_TOO_LARGE = 2**38
"""Bytes that no chip has."""


def find(name: str) -> Any:
    """The topology of this name.

    Raises:
      ValueError: libtpu is not installed, or it knows no such topology.
    """
    generation, _, shape = name.partition(":")
    dimensions = _SHAPES.get(generation)
    pattern = r"\d+" + r"x\d+" * ((dimensions or 1) - 1)
    if dimensions is None or not re.fullmatch(pattern, shape):
        raise ValueError(
            "topology: expected a generation and the shape of a slice, such as v5e:4x4, "
            f"v6e:8x8 or v5p:2x2x2, got {name!r}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu: expected it to be installed, for it has the TPU compiler, got none; "
            "run pip install 'recurrentgemma[tpu-plan]'"
        )
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # JAX has no common type for what libtpu refuses.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"topology: expected one that the TPU compiler knows, got {name!r} ({reason})"
        ) from error


def make_mesh(topology: Any, text: str) -> Mesh:
    """A mesh of all chips of a topology.

    Args:
      topology: from `find`.
      text: axes and sizes, as `recurrentgemma train --mesh` takes them.

    Raises:
      ValueError: the sizes do not multiply to the number of chips.
    """
    sizes = filled_axes(text or "data", len(topology.devices))
    kinds = (AxisType.Auto,) * len(sizes)
    try:
        found = topologies.make_mesh(topology, tuple(sizes.values()), tuple(sizes))
        devices = found.devices
    except NotImplementedError:  # Axes that do not follow the links of the slice.
        devices = np.array(topology.devices).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=kinds)


def rows(mesh: Mesh) -> int:
    """Number of chips, or groups of chips, that have different rows of a batch."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH[0])


def memory_bytes(topology: Any) -> int:
    """Memory of a chip that a program may use: what the compiler says when it refuses
    one that is too large."""
    sharding = NamedSharding(
        Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec()
    )
    array = jax.ShapeDtypeStruct((_TOO_LARGE // 4,), jnp.float32, sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(array).compile()
    except Exception as error:
        if refused := Refusal.of(error):
            return refused.available_bytes
        raise
    raise RuntimeError("topology: the compiler accepts a program that no chip can hold")


class Refusal(NamedTuple):
    """A program that needs more memory than a chip has."""

    needed_bytes: int
    available_bytes: int

    @classmethod
    def of(cls, error: BaseException) -> "Refusal | None":
        """What the compiler's error says; None if it is another error."""
        match = re.search(
            r"Used (\S+) of (\S+) hbm|\(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)",
            str(error),
        )
        if match is None:
            return None
        needed, available = (text for text in match.groups() if text)
        return cls(_bytes(needed), _bytes(available))


def _bytes(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number = text.rstrip("B")
    return int(float(number.rstrip("KMGT")) * units.get(number[-1], 1))
