"""The devices of a run: processes that meet, and a mesh of all their devices.

A mesh has up to four axes, each of which cuts something else:

    data      the rows of a batch; every device has all parameters
    fsdp      the rows too, and every parameter: each device keeps a part of it, and
              gathers the others while a layer runs (arXiv 2304.11277)
    tensor    the channels of a layer and the pieces of the vocabulary (arXiv 1909.08053)
    sequence  the tokens of a row, in contiguous shards (`recurrentgemma.kernels.sharded`)
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from recurrentgemma import _validation as check
from recurrentgemma.training.options import option

AXES = ("data", "fsdp", "tensor", "sequence")
"""Names of the axes of a mesh, in the order in which devices fill them last to first."""
TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
ONE_PROCESS, DETECTED = "one", "auto"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices of a run: where it runs, not what it is.

    Raises:
      ValueError: a value is none of those that its help names.
    """

    mesh: str = option(
        f"axes of the mesh ({', '.join(AXES)}) and number of devices along each, such "
        "as data=2,fsdp=4; one axis without a number gets the remaining devices; empty "
        "is one device",
        default="",
        may_change=True,
    )
    mesh_type: str = option(
        "auto (the compiler finds where intermediate arrays lie) or explicit (types of "
        "arrays say so)",
        default="auto",
        may_change=True,
    )
    processes: str = option(
        f"{ONE_PROCESS}; {DETECTED} (one of several processes, which JAX finds on TPU "
        "pods and under Slurm, Open MPI and Kubernetes); or HOST:PORT,COUNT,INDEX with "
        "the address of the first process, their number and the index of this one",
        default=ONE_PROCESS,
        may_change=True,
    )

    def __post_init__(self):
        axis_sizes(self.mesh)
        check.choice("mesh_type", self.mesh_type, TYPES)
        _processes(self.processes)

    def join(self) -> None:
        """Meets the other processes of the run; before anything else uses JAX.

        Raises:
          ValueError: JAX finds no other processes.
        """
        if self.processes == ONE_PROCESS or jax.distributed.is_initialized():
            return
        try:
            jax.distributed.initialize(**_processes(self.processes))
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"processes: expected processes that can meet, got {reason}; pass "
                "HOST:PORT,COUNT,INDEX"
            ) from error

    def make(self, devices: Sequence[Any] | None = None) -> Mesh | None:
        """The mesh; None for one device.

        Args:
          devices: those to use; None is all.

        Raises:
          ValueError: the axes do not multiply to the number of devices.
        """
        if not self.mesh:
            return None
        devices = jax.devices() if devices is None else devices
        sizes = filled_axes(self.mesh, len(devices))
        kinds = (TYPES[self.mesh_type],) * len(sizes)
        return jax.make_mesh(
            tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices
        )


def axis_sizes(text: str) -> dict[str, int | None]:
    """Sizes by axis of a text such as "data=2,fsdp"; None is the remaining devices.

    Raises:
      ValueError: an axis is unknown or comes twice, or a size is no positive number.
    """
    sizes: dict[str, int | None] = {}
    for part in text.split(",") if text else ():
        name, equals, size = part.strip().partition("=")
        if name not in AXES or name in sizes or (equals and not _positive(size)):
            raise ValueError(
                f"mesh: expected different axes of {', '.join(AXES)} with numbers of "
                f"devices, such as data=2,fsdp=4, got {part.strip()!r} in {text!r}"
            )
        sizes[name] = int(size) if equals else None
    if list(sizes.values()).count(None) > 1:
        raise ValueError(
            f"mesh: expected one axis at most without a number, got {text!r}"
        )
    return sizes


def filled_axes(text: str, num_devices: int) -> dict[str, int]:
    """All sizes of `axis_sizes`, for a number of devices; in the order of `AXES`.

    Raises:
      ValueError: they do not multiply to the number of devices.
    """
    sizes = axis_sizes(text)
    known = math.prod(size for size in sizes.values() if size is not None)
    filled = {
        axis: sizes[axis] or num_devices // known for axis in AXES if axis in sizes
    }
    if math.prod(filled.values()) != num_devices:
        raise ValueError(
            f"mesh: expected axes that multiply to {num_devices} devices, got {text}; "
            "leave out the number of one axis to give it the remaining devices"
        )
    return filled


def _positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def _processes(text: str) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize`."""
    if text in (ONE_PROCESS, DETECTED):
        return {}
    match = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", text)
    if match is None or int(match[3]) >= int(match[2]):
        raise ValueError(
            f"processes: expected {ONE_PROCESS}, {DETECTED} or HOST:PORT,COUNT,INDEX with "
            f"an index below the count, got {text!r}"
        )
    return {
        "coordinator_address": match[1],
        "num_processes": int(match[2]),
        "process_id": int(match[3]),
    }
