"""Where a training run lies on its devices: the mesh, and a rule for every array.

A mesh has up to four axes, each of which cuts something else:

    data      the rows of a batch; every device has all parameters
    fsdp      the rows too, and every parameter: each device keeps a part of it, and
              gathers the others while a layer runs (arXiv 2304.11277)
    tensor    the channels of a layer and the pieces of the vocabulary (arXiv 1909.08053)
    sequence  the tokens of a row, in contiguous shards (`recurrentgemma.kernels.sharded`)

`RULES` says which dimension of a parameter lies along which axis, by native name. The
moments of an optimizer lie like their parameters. A dimension that an axis does not divide
stays whole.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from recurrentgemma.kernels import meshes
from recurrentgemma.training.options import option

AXES = ("data", "fsdp", "tensor", "sequence")
"""Names of the axes of a mesh, in the order in which devices fill them last to first."""
BATCH = (("data", "fsdp"), ("sequence",))
"""Axes along which the rows and the tokens of a batch are cut."""
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedder\.embedding", ("tensor", "fsdp")),
    # Blocks of the gates are channels of the recurrence.
    (r".*\.(recurrence_gate|input_gate)\.kernel", ("tensor", "fsdp", None)),
    (r".*\.(recurrence_gate|input_gate)\.bias", ("tensor", None)),
    (r".*\.a_param|.*\.a_imag_param|.*\.conv_1d\.bias", ("tensor",)),
    (r".*\.conv_1d\.kernel", (None, "tensor")),
    # From channels to the residual stream, which is whole on every device.
    (r".*\.(linear_out|proj_out|down)\.kernel", ("tensor", "fsdp")),
    (r".*\.(linear_out|proj_out|down)\.bias", (None,)),
    # From the residual stream to channels.
    (r".*\.kernel", ("fsdp", "tensor")),
    (r".*\.bias", ("tensor",)),
)
"""Axes of the dimensions of a parameter, by patterns of whole native names; the first
pattern that matches holds. What has no rule (norms) is whole on every device."""
PARTS = re.compile(r"(.+?)(?:\.(base|lora_a|lora_b))?(?:\.(values|scales))?")
"""Native names: of a matrix, of the parts of an adapted one (W + A B), and of a quantised
one's integers and scales."""
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
    )
    mesh_type: str = option(
        "auto (the compiler finds where intermediate arrays lie) or explicit (types of "
        "arrays say so)",
        default="auto",
    )
    processes: str = option(
        f"{ONE_PROCESS}; {DETECTED} (one of several processes, which JAX finds on TPU "
        "pods and under Slurm, Open MPI and Kubernetes); or HOST:PORT,COUNT,INDEX with "
        "the address of the first process, their number and the index of this one",
        default=ONE_PROCESS,
    )

    def __post_init__(self):
        axis_sizes(self.mesh)
        if self.mesh_type not in TYPES:
            raise ValueError(
                f"mesh_type: expected one of {', '.join(TYPES)}, got {self.mesh_type!r}"
            )
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


def spec_of(
    name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Where a parameter lies, by its native name.

    Stacked layers (`groups.0...`) have the number of groups before the shape of one. Of
    an adapted matrix, A [in, r] lies like its inputs and B [r, out] like its outputs; of
    a quantised one, scales lie like what they scale.
    """
    match = PARTS.fullmatch(name)
    name, part = (match[1], match[2]) if match else (name, None)
    rule = next((axes for pattern, axes in RULES if re.fullmatch(pattern, name)), ())
    if part == "lora_a":
        rule = (*rule[:-1], None)
    elif part == "lora_b":
        rule = (*rule[:-2], None, *rule[-1:])
    leading = len(shape) - len(rule)
    if not rule or leading != name.startswith("groups."):
        return PartitionSpec()  # No matrix of ours: a mixer of the user's.
    axes = [
        axis if axis in mesh.shape and length % mesh.shape[axis] == 0 else None
        for axis, length in zip((None,) * leading + rule, shape, strict=True)
    ]
    return PartitionSpec(*axes)


def shardings_of(
    shapes: Mapping[str, Sequence[int]], mesh: Mesh
) -> dict[str, NamedSharding]:
    """Where parameters lie.

    Args:
        shapes: shapes by native name.
        mesh: of axes of `AXES`.
    """
    return {
        name: NamedSharding(mesh, spec_of(name, shape, mesh))
        for name, shape in shapes.items()
    }


def rule_of(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The `sharding` for `recurrentgemma.load` that lays parameters on a mesh."""
    return lambda name, shape: NamedSharding(mesh, spec_of(name, shape, mesh))


def state_specs(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Where every array of a training state lies, a tree like it.

    A leaf belongs to the parameter by whose native name it is found in a dictionary.
    """

    def spec(path, leaf):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not keys or not leaf.ndim:
            return PartitionSpec()
        return spec_of(str(keys[-1]), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(spec, state)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """`state_specs` on a mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), state_specs(state, mesh)
    )


def made_on_host(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Within, new arrays lie in the memory of the host, for `place`: no device need hold
    a whole model."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def place(state: Any, mesh: Mesh | None) -> Any:
    """The same arrays laid out on a mesh; every process has all of each.

    Args:
        state: a training state, parameters by native name, or any tree of such.
        mesh: None leaves them where they are.
    """
    if mesh is None:
        return state
    return jax.tree.map(_put, state, state_shardings(state, mesh))


def _put(array, sharding):
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where arrays [B, T] of a batch lie."""
    axes = (tuple(a for a in dim if a in mesh.shape) or None for dim in BATCH)
    return NamedSharding(mesh, PartitionSpec(*axes))


def place_batch(batch: Any, beside: jax.Array) -> Any:
    """A batch of arrays [B, T] on the mesh, every process having made all of it.

    Args:
        batch: a pytree of arrays on the host.
        beside: an array of the training state; if it lies on no mesh, the batch comes
            back as it is.
    """
    if not isinstance(beside.sharding, NamedSharding):
        return batch
    sharding = batch_sharding(beside.sharding.mesh)
    return jax.tree.map(lambda array: _put(array, sharding), batch)


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Within, programs run on the mesh; None is one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check_batch(mesh: Mesh | None, batch_size: int, length: int) -> None:
    """Raises ValueError unless the rows and tokens of a batch divide by the mesh."""
    if mesh is None:
        return
    for name, count, axes in zip(
        ("batch_size", "sequence_length"), (batch_size, length), BATCH, strict=True
    ):
        devices = math.prod(mesh.shape.get(axis, 1) for axis in axes)
        if count % devices:
            raise ValueError(
                f"{name}: expected a multiple of {devices}, the devices along "
                f"{' and '.join(axes)}, got {count}; change it, or the mesh"
            )


def keep_shardings(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step (state, ...) -> (state, results) whose state stays where it lies.

    Goes under `jax.jit`. Under a mesh, the state that comes back lies as `RULES` says, and
    results are whole on every device.
    """

    @functools.wraps(step)
    def run(state, *arguments):
        mesh = meshes.current_mesh(jax.tree.leaves((state, arguments)))
        if mesh.empty:
            return step(state, *arguments)
        specs = state_specs(state, mesh)

        def kept(*arguments):
            new, results = step(*arguments)
            mesh = meshes.current_mesh(jax.tree.leaves(arguments))
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            return jax.lax.with_sharding_constraint(new, shardings), results

        whole = (specs, PartitionSpec())
        return meshes.with_auto_axes(kept, lambda: whole, state, *arguments)

    return run


def on_host(params: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Whole parameters in the memory of every process, gathered one after another."""

    def gather(array):
        whole = NamedSharding(array.sharding.mesh, PartitionSpec())
        return np.asarray(jax.jit(lambda x: x, out_shardings=whole)(array))

    return {name: gather(array) for name, array in params.items()}
