"""Ops under a mesh: which devices take which part of a kernel's work.

A mesh axis means what `AXIS_ROLES` says of its name. A kernel is cut along rows and
channels, by `shard_map`: the compiler cannot partition it. Where an axis has no role,
or channels do not divide, the plain form of the op runs, and the compiler partitions
that without a gather.

An axis for time cuts sequences in contiguous shards. What passes information along time
enters by `run_along_time`, the one place that knows of it: each device runs the op on
its shard, after a form that gets what comes before the shard from the other devices
(`sharded.py`). A sequence that does not divide is whole on every device.

Explicit axes (the default of `jax.make_mesh`) type every array with its sharding, and
most operations inside the ops have no rule for that. So an op turns them to Auto, and
its results get the shardings of its arguments: `with_auto_axes`.

Inside a `shard_map` of the caller each device has its own part and kernels run as they
are. With `check_vma=True` arrays are typed with the axes along which they vary. The
results of kernels are not, so the plain form runs there; its loops need arguments of
one type (`vary_alike`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

AXIS_ROLES = {
    "data": "rows",
    "fsdp": "rows",
    "tensor": "channels",
    "model": "channels",
    "sequence": "time",
}
"""Role of a mesh axis, by its name. Rows and channels of a kernel are independent."""

PARAMETER_AXES = ("fsdp",)
"""Axes of the rows along which parameters are cut too."""

LETTER_ROLES = {"b": "rows", "t": "time"} | dict.fromkeys("cgnk", "channels")
"""Role of a dimension, by its letter: b rows, t tokens, c channels, g groups of channels,
n and k heads. Other dimensions are never cut."""

Cut = dict[str, tuple[str, ...]]
"""Mesh axes along which the dimension of a letter is cut."""


def words(dims: str) -> tuple[list[str], list[str]]:
    """The letters of each argument and of each result in "btc,bc->btc"."""
    arguments, results = dims.split("->")
    return arguments.split(","), results.split(",")


def present(letters: Sequence[str], arguments: Any) -> list[tuple[str, jax.Array]]:
    """Letters and array of each leaf of the arguments that is given, not None."""
    leaves = jax.tree.leaves(arguments, is_leaf=lambda leaf: leaf is None)
    pairs = zip(letters, leaves, strict=True)
    return [(word, leaf) for word, leaf in pairs if leaf is not None]


def current_mesh(arrays: Sequence[jax.Array]) -> AbstractMesh:
    """The mesh of the context, else the one on which an argument lies; may be empty."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh
    for array in arrays:
        mesh = getattr(jax.typeof(array).sharding, "mesh", mesh)
        if not mesh.empty:
            break
    return mesh


def axes_of_type(mesh: AbstractMesh, kind: AxisType) -> tuple[str, ...]:
    """Names of the axes of one type."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in types if axis_type == kind)


def plan_cut(
    mesh: AbstractMesh, arguments: Sequence[tuple[str, jax.Array]]
) -> Cut | str:
    """How to cut a kernel with these `present` arguments, or why that cannot be."""
    lengths: dict[str, int] = {}
    for word, array in arguments:
        lengths |= zip(word, array.shape, strict=True)
    if _checks_varying_axes(mesh):
        return "its results have no types for jax.shard_map(..., check_vma=True)"
    cut: Cut = {}
    parts_of: dict[str, int] = {}
    for axis in axes_of_type(mesh, AxisType.Auto):
        role, size = AXIS_ROLES.get(axis), mesh.shape[axis]
        if size == 1 or role == "time":
            continue  # Whoever cuts along time has done so: `run_along_time`.
        if role is None:
            return f"it is not cut along mesh axis {axis!r}"
        # A single head of keys serves every head of queries, and stays whole.
        letters_of_role = [
            letter
            for letter, length in lengths.items()
            if LETTER_ROLES.get(letter) == role and (letter, length) != ("k", 1)
        ]
        parts = size * parts_of.get(role, 1)
        if any(lengths[letter] % parts for letter in letters_of_role):
            if role == "rows":
                continue  # They cannot be sharded: every device has them already.
            return f"its channels do not divide by mesh axis {axis!r} of {size} devices"
        parts_of[role] = parts
        for letter in letters_of_role:
            cut[letter] = (*cut.get(letter, ()), axis)
    return cut


def run_cut(
    function: Callable[..., Sequence[jax.Array]],
    arguments: Sequence[tuple[str, jax.Array]],
    results: Sequence[str],
    sum_results: bool,
) -> Sequence[jax.Array]:
    """Runs a function of arrays on each device's part of them, as `plan_cut` says.

    Args:
      function: function of arrays, returns several.
      arguments: letters of the dimensions of each array, and the array.
      results: letters of each result.
      sum_results: whether a result is a sum over the dimensions that it lacks, as the
        gradient of an argument is: then the devices' sums are added.
    """
    letters, arrays = zip(*arguments, strict=True)
    mesh = current_mesh(arrays)
    axes = axes_of_type(mesh, AxisType.Auto)
    if all(mesh.shape[axis] == 1 for axis in axes):
        return function(*arrays)
    cut = plan_cut(mesh, arguments)
    assert not isinstance(cut, str), f"a kernel was chosen although {cut}"
    used = {axis for axes in cut.values() for axis in axes}

    def spec(word):
        return PartitionSpec(*(cut.get(letter) for letter in word))

    def part(*arrays):
        found = function(*arrays)
        if not sum_results:
            return tuple(found)
        added = []
        for word, result in zip(results, found, strict=True):
            over = used.difference(*(cut.get(letter, ()) for letter in word))
            added.append(jax.lax.psum(result, tuple(sorted(over))) if over else result)
        return tuple(added)

    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=tuple(map(spec, letters)),
        out_specs=tuple(map(spec, results)),
        axis_names=set(axes),
        check_vma=False,
    )(*arrays)


def time_axis(mesh: AbstractMesh) -> str | None:
    """The Auto axis that cuts sequences, if the mesh has one of several devices."""
    axes = axes_of_type(mesh, AxisType.Auto)
    of_time = (a for a in axes if AXIS_ROLES.get(a) == "time" and mesh.shape[a] > 1)
    return next(of_time, None)


def dividing_axes(
    mesh: AbstractMesh, role: str | None, lengths: Iterable[int]
) -> tuple[str, ...]:
    """The Auto axes of a role, of several devices, by which all these lengths divide."""
    lengths, taken, parts = list(lengths), [], 1
    for axis in axes_of_type(mesh, AxisType.Auto):
        devices = parts * mesh.shape[axis]
        has_role = role is not None and AXIS_ROLES.get(axis) == role
        if has_role and devices > parts and not any(n % devices for n in lengths):
            taken.append(axis)
            parts = devices
    return tuple(taken)


def constrain(word: str, array: jax.Array) -> jax.Array:
    """The same array, cut along the Auto axes of the mesh as its dimensions say.

    The compiler propagates the rest: without it, matrices that are cut along the axes of
    the rows could make it gather rows instead.
    """
    mesh = current_mesh([array])
    return _lay(
        array,
        mesh,
        [_axes_of(mesh, *pair) for pair in zip(word, array.shape, strict=True)],
    )


def constrain_lookup(array: jax.Array) -> jax.Array:
    """[B, T, D] cut as `constrain("btd")` does, by way of what the lookup gives.

    Rows of a matrix that is cut along D by `PARAMETER_AXES` come with all B and a part of
    D. Left to choose, the compiler gathers their gradient on every device.
    """
    mesh = current_mesh([array])
    rows, time, _ = (
        _axes_of(mesh, *pair) for pair in zip("btd", array.shape, strict=True)
    )
    own = tuple(axis for axis in rows if axis in PARAMETER_AXES)
    if own and array.shape[2] % math.prod(mesh.shape[axis] for axis in own) == 0:
        others = tuple(axis for axis in rows if axis not in own)
        array = _lay(array, mesh, [others, time, own])
    return constrain("btd", array)


def _axes_of(mesh, letter, length):
    return dividing_axes(mesh, LETTER_ROLES.get(letter), [length])


def _lay(array, mesh, axes):
    if not any(axes):
        return array
    spec = PartitionSpec(*(axis or None for axis in axes))
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def run_along_time(
    dims: str,
    run: Callable[..., Any],
    on_shards: Callable[..., Any],
    *arguments: Any,
    least_tokens: int = 1,
) -> Any:
    """`run(*arguments)`, or `on_shards` where the mesh cuts sequences along time.

    Args:
      dims: letters of the dimensions of every array among arguments and results.
      run: function of the arguments; returns a pytree of arrays.
      on_shards: function of the name of the mesh axis and of each device's part of the
        arguments, among them its shard of the sequence; returns its part of the results.
        Results without tokens are the same on all devices of that axis.
      *arguments: pytrees of arrays; None stands for an array that is not given.
      least_tokens: shards of fewer tokens are left to the compiler.
    """
    letters, of_results = words(dims)
    given = present(letters, arguments)
    mesh = current_mesh([array for _, array in given])
    axis = time_axis(mesh)
    cut = {} if axis is None else _cut_along_time(mesh, given, least_tokens)
    if axis is None or "t" not in cut:
        return run(*arguments)
    structure, found_structure = jax.tree.structure(arguments), None

    def spec(word):
        return PartitionSpec(*(cut.get(letter) for letter in word))

    def part(*leaves):
        nonlocal found_structure
        found = on_shards(axis, *jax.tree.unflatten(structure, leaves))
        found, found_structure = jax.tree.flatten(found)
        return tuple(found)

    found = jax.jit(
        jax.shard_map(
            part,
            mesh=mesh,
            in_specs=tuple(spec(word) for word, _ in given),
            out_specs=tuple(map(spec, of_results)),
            axis_names=set(axes_of_type(mesh, AxisType.Auto)),
            check_vma=False,
        )
    )(*(array for _, array in given))
    return jax.tree.unflatten(found_structure, found)


def _cut_along_time(mesh, given, least_tokens) -> Cut:
    """How to cut sequences and all that belongs to them."""
    lengths = {
        letter: length
        for word, array in given
        for letter, length in zip(word, array.shape, strict=True)
        if (letter, length) != ("k", 1)  # As for kernels.
    }
    cut: Cut = {}
    for role in set(LETTER_ROLES.values()):
        letters = [letter for letter in lengths if LETTER_ROLES.get(letter) == role]
        axes = dividing_axes(mesh, role, (lengths[letter] for letter in letters))
        cut |= {letter: axes for letter in letters if axes}
    shards = math.prod(mesh.shape[axis] for axis in cut.get("t", ()))
    if lengths["t"] < least_tokens * shards:
        del cut["t"]
    return cut


def with_auto_axes(
    function: Callable[..., Any], results: Callable[[], Any], *arguments: Any
) -> Any:
    """`function(*arguments)` with the Explicit axes of the mesh turned to Auto.

    Args:
      function: takes the arguments, returns a pytree.
      results: gives the `PartitionSpec`s of what is returned, a prefix of that pytree;
        called where there are Explicit axes.
      *arguments: pytrees of arrays.
    """
    mesh = current_mesh(jax.tree.leaves(arguments))
    explicit = axes_of_type(mesh, AxisType.Explicit)
    if not explicit:
        return function(*arguments)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), results())
    run = jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)
    return run(*arguments)


def as_program(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with Explicit axes turned to Auto, its results whole on every device.

    For programs that make their own arrays, such as decoding; goes under `jax.jit`.
    Keyword arguments are static.
    """

    @functools.wraps(function)
    def run(*arguments, **static):
        call = functools.partial(function, **static)
        return with_auto_axes(call, PartitionSpec, *arguments)

    return run


def rows_spec(array: jax.Array) -> tuple[PartitionSpec, PartitionSpec]:
    """Explicit shardings of arrays like [B, T, ...], and like [B, ...]."""
    spec = jax.typeof(array).sharding.spec
    return PartitionSpec(*spec), PartitionSpec(*spec[:1])


def result_specs(dims: str, arguments: Any) -> tuple[PartitionSpec, ...]:
    """The `PartitionSpec`s of an op's results, from its arguments' Explicit shardings.

    A dimension is sharded as the dimension of that letter in the first argument where
    it is, unless a dimension before it takes the same mesh axis.

    Args:
      dims: letters of arguments and results.
      arguments: pytrees of arrays; None stands for an array that is not given.
    """
    of_arguments, of_results = words(dims)
    axes: dict[str, Any] = {}
    for word, leaf in present(of_arguments, arguments):
        for letter, axis in zip(word, jax.typeof(leaf).sharding.spec, strict=True):
            axes[letter] = axes.get(letter) or axis
    specs = []
    for word in of_results:
        taken: set[str] = set()
        spec = []
        for letter in word:
            found = axes.get(letter) or ()
            found = (found,) if isinstance(found, str) else tuple(found)
            free = taken.isdisjoint(found)
            spec.append(found if found and free else None)
            taken |= set(found)
        specs.append(PartitionSpec(*spec))
    return tuple(specs)


def vary_alike(arguments: Any) -> Any:
    """The same arguments, all typed as varying along the axes that any of them does."""
    leaves = jax.tree.leaves(arguments)
    axes = frozenset().union(*map(_varying_axes, leaves))
    if not axes:
        return arguments

    return jax.tree.map(
        lambda array: _vary(array, tuple(axes - _varying_axes(array))), arguments
    )


def _vary(array, axes):
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, axes, to="varying")
    return jax.lax.pvary(array, axes)


def _varying_axes(array):
    aval = jax.typeof(array)
    if hasattr(aval, "manual_axis_type"):
        return aval.manual_axis_type.varying
    return aval.vma


def _checks_varying_axes(mesh):
    """Whether this is in a `shard_map` with `check_vma=True`: without, types are bare."""
    manual = axes_of_type(mesh, AxisType.Manual)
    return bool(manual) and bool(_varying_axes(_vary(jnp.zeros(()), manual)))
