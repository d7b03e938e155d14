"""Which implementation of an op runs.

An op has a table of implementations by name: plain functions, which run anywhere, and
`Kernel`s, which are written for one platform. Elsewhere a kernel runs interpreted, when
it is asked for by name: slow, for tests.

A kernel cannot be partitioned by the compiler. Under a mesh (`jax.set_mesh`) it is
wrapped in `shard_map` here, rows over the mesh axis "data" and channels over "model",
so that nothing above the ops needs to know of meshes. In a program for several devices
without a mesh, the plain implementation takes its place.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, PartitionSpec

from recurrentgemma.kernels import precision

einsum_float32 = precision.einsum_float32

MESH_AXES = {"b": "data", "c": "model", "g": "model"}
"""Mesh axis over which a dimension of a kernel's arrays is sharded, by its letter. All
letters of an axis are sharded, or none is."""


class Kernel(NamedTuple):
    """An implementation for one platform.

    Attributes:
      run: takes the op's arrays and options, and `interpret`.
      platform: "tpu", "cuda", ...
      dims: letters of the dimensions of arguments and results, such as "btc,bc->btc";
        rows (b), channels (c) and groups of channels (g) are independent of each other,
        other letters are not.
      supports: takes the op's arrays and options; says why they do not fit, or None.
    """

    run: Callable[..., Any]
    platform: str
    dims: str
    supports: Callable[..., str | None]


def imported_late(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when the function is first called.

    Pallas takes a tenth of a second to import, which only its users should pay.
    """

    def run(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    return run


def takes(*dtypes: Any) -> Callable[..., str | None]:
    """A `Kernel.supports` for kernels whose floating-point arrays are of these dtypes."""

    def supports(*arrays: jax.Array, **_: Any) -> str | None:
        for array in arrays:
            floating = jnp.issubdtype(array.dtype, jnp.floating)
            if floating and array.dtype not in dtypes:
                names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
                return f"it takes {names}, not {array.dtype}"
        return None

    return supports


Table = Mapping[str, Callable[..., Any] | Kernel]


def dispatch(
    op: str,
    implementations: Table,
    platform_defaults: Mapping[str, tuple[str, ...]],
    implementation: str | None,
    *args: Any,
    **options: Any,
) -> Any:
    """Runs one implementation of an op on `args`.

    Args:
      op: the op's name, for errors.
      implementations: the op's table, all of one signature.
      platform_defaults: platform ("cpu", "cuda", "tpu", ...) -> names, the best first;
        the last one is a plain function. The key "default" is every platform that is
        not listed.
      implementation: a name of the table, or None for the platform's default. The
        platform is the one compiled for, not the one that traces.
      *args: positional arguments of the implementations; arrays, None, or pytrees.
      **options: keyword arguments of the implementations; hashable.

    Raises:
      NotImplementedError: there is no such implementation, or it does not take these
        arguments.
    """
    if implementation is None:
        by_platform = {
            platform: _best(implementations, names, args, options)
            for platform, names in platform_defaults.items()
        }
        if len(set(by_platform.values())) == 1:
            return by_platform["default"](*args)
        return jax.lax.platform_dependent(*args, **by_platform)
    if implementation not in implementations:
        raise NotImplementedError(
            f"{op} has no implementation {implementation!r}; it has "
            f"{', '.join(sorted(implementations))}."
        )
    chosen = implementations[implementation]
    if isinstance(chosen, Kernel):
        reason = chosen.supports(*args, **options)
        if reason:
            raise NotImplementedError(f"{op}: {implementation} cannot run: {reason}.")
        plain: Any = implementations[platform_defaults["default"][-1]]
        chosen = _Call(chosen, plain, tuple(options.items()), implementation)
        return chosen(*args)
    return chosen(*args, **options)


def _best(implementations: Table, names: tuple[str, ...], args, options):
    """The first of the names that takes these arguments, as a function of arrays."""
    *kernels, last = names
    plain: Any = implementations[last]
    for name in kernels:
        kernel = implementations[name]
        if isinstance(kernel, Kernel) and not kernel.supports(*args, **options):
            return _Call(kernel, plain, tuple(options.items()), None)
    return _Plain(plain, tuple(options.items()))


@dataclasses.dataclass(frozen=True)
class _Plain:
    """A plain function with its options; equal to another one of the same."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A kernel, and the plain function that stands for it where it cannot run."""

    kernel: Kernel
    plain: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]
    name: str | None
    """If the caller asked for this kernel by name: then nothing stands for it."""

    def __call__(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        def run(*args):
            return tuple(_kernel_p.bind(*args, call=self))

        mesh = jax.sharding.get_abstract_mesh()
        free = {
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind != AxisType.Manual
        }
        if not free:
            return run(*args)
        inputs, results = self.kernel.dims.split("->")
        lengths: dict[str, int] = {}
        for letters, array in zip(inputs.split(","), args, strict=True):
            lengths |= zip(letters, array.shape, strict=True)
        whole = {
            axis
            for letter, axis in MESH_AXES.items()
            if axis in free and lengths.get(letter, 0) % mesh.shape[axis]
        }
        axes = {
            letter: axis
            for letter, axis in MESH_AXES.items()
            if axis in free and axis not in whole
        }

        def specs(words):
            return tuple(
                PartitionSpec(*(axes.get(letter) for letter in word))
                for word in words.split(",")
            )

        sharded = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=specs(inputs),
            out_specs=specs(results),
            axis_names=free,
            check_vma=False,
        )
        return sharded(*args)

    def run_plain(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(self.plain(*args, **dict(self.options)))


# Staged as one operation, a kernel is traced only for the platform that runs it: the
# others neither import it nor wait for it.
_kernel_p = Primitive("kernel")
_kernel_p.multiple_results = True
_kernel_p.def_impl(lambda *args, call: _compiled(*args, call=call))


@partial(jax.jit, static_argnames="call")
def _compiled(*args, call):
    return _kernel_p.bind(*args, call=call)


@_kernel_p.def_abstract_eval
def _results(*args, call):
    return _results_of(call, *((arg.shape, arg.dtype) for arg in args))


@lru_cache(maxsize=1024)
def _results_of(call, *arrays):
    """Cached: tracing what stands for a kernel takes a while, and layers are alike."""
    shapes = (jax.ShapeDtypeStruct(*array) for array in arrays)
    results = jax.eval_shape(call.run_plain, *shapes)
    return [ShapedArray(result.shape, result.dtype) for result in results]


def _lower(ctx, *args, call):
    run = partial(call.kernel.run, **dict(call.options))
    platform = (ctx.platforms or ctx.module_context.platforms)[0]
    if platform != call.kernel.platform:
        run = partial(run, interpret=True)
    elif not _one_device(ctx.module_context.axis_context):
        if call.name:
            raise NotImplementedError(
                f"{call.name} cannot run in a program for several devices without a "
                "mesh: call it under jax.set_mesh(mesh), or leave the choice to None."
            )
        run = call.run_plain
    return mlir.lower_fun(run, multiple_results=True)(ctx, *args)


def _one_device(context) -> bool:
    """Whether the compiler would have nothing to partition here."""
    if hasattr(context, "num_devices"):
        return context.num_devices == 1
    mesh = getattr(context, "mesh", None)
    if mesh is None or mesh.size == 1:
        return True
    return set(context.manual_axes) | set(mesh.manual_axes) == set(mesh.axis_names)


def _jvp(primals, tangents, *, call):
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(call.run_plain, tuple(primals), tangents)


def _batch(args, axes, *, call):
    def vectorised(function):
        def run(*args, **options):
            return jax.vmap(partial(function, **options), in_axes=tuple(axes))(*args)

        return run

    kernel = call.kernel._replace(run=vectorised(call.kernel.run))
    call = dataclasses.replace(call, kernel=kernel, plain=vectorised(call.plain))
    results = _kernel_p.bind(*args, call=call)
    return results, [0] * len(results)


mlir.register_lowering(_kernel_p, _lower)
ad.primitive_jvps[_kernel_p] = _jvp
batching.primitive_batchers[_kernel_p] = _batch
