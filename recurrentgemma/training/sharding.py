"""Where every array of a training run lies on the mesh: one table of rules.

`RULES` says which dimension of a parameter lies along which axis (`mesh.py`), by native
name. The moments of an optimizer lie like their parameters. A dimension that an axis does
not divide stays whole.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from recurrentgemma.kernels import meshes
from recurrentgemma.training.mesh import AXES

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
        if keys:
            return spec_of(str(keys[-1]), leaf.shape, mesh)
        # A number, or the caches that rows begin with.
        axes = tuple(axis for axis in BATCH[0] if axis in mesh.shape)
        devices = math.prod(mesh.shape[axis] for axis in axes)
        fits = axes and leaf.ndim and leaf.shape[0] % devices == 0
        return PartitionSpec(axes) if fits else PartitionSpec()

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

    Goes under `jax.jit`. Under a mesh of these axes, the state that comes back lies as
    `RULES` says, and results are whole on every device.
    """

    @functools.wraps(step)
    def run(state, *arguments):
        mesh = meshes.current_mesh(jax.tree.leaves((state, arguments)))
        if not set(AXES) & set(mesh.axis_names):
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


def whole(params: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """Whole parameters in the memory of every process, gathered one after another;
    those of one device are as they are. Outside of `on`."""
    if not isinstance(next(iter(params.values())).sharding, NamedSharding):
        return params
    host = jax.local_devices(backend="cpu")[0]

    def gather(array):
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
        array = jax.jit(lambda x: x, out_shardings=everywhere)(array)
        return jax.device_put(np.asarray(array), host)

    return {name: gather(array) for name, array in params.items()}
