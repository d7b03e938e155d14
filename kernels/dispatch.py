"""Which implementation of an op runs: one table an op, one way in.

    op = Op("linear_scan", "btc,btc,bc->btc,bc", {"pallas_tpu": Implementation(...), ...})
    y, h_last = call(op, implementation, x, a, h0, reverse=False)

The order of a table is the order of preference. Without a name, each platform gets the
first entry that is a default there and takes the arguments. `jax.lax.platform_dependent`
picks by the platform compiled for, not the one that traces, so that compilation ahead
of time for another platform gets that platform's kernel. With a name, that entry runs.

An entry that brings its gradient is wrapped in `jax.custom_vjp`; another one is
differentiated by JAX, in every mode. Entries that are kernels run on parts of their
arrays under a mesh (`meshes.py`), and interpreted on CPU.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.dtypes import float0

from recurrentgemma.kernels import gpu, meshes, precision
from recurrentgemma.kernels.checks import check_implementation

EVERYWHERE = ("default",)
"""`Implementation.default_on` of an entry that may be chosen on every platform."""


def takes_anything(*arguments: Any, **options: Any) -> str | None:
    """`Implementation.supports` of an entry that runs whatever the op takes."""
    del arguments, options


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An entry of an op's table.

    Attributes:
      forward: function of the op's arguments and options; the results, a tuple of
        arrays. A kernel takes `interpret` too.
      gradient: function of the arguments, the results (both as `Op.keep` leaves them),
        the gradients of the results, and the options; the gradients of the arguments,
        None for those that have none. None is automatic differentiation.
      kernel_for: platform that a kernel is written for, such as "tpu"; None is plain
        JAX, which runs everywhere.
      default_on: platforms on which the entry may be chosen without a name; a kernel for
        GPU only where it has shown that it runs (`gpu.py`).
      supports: function of the arguments and options; the reason why the entry cannot
        run, or None.
    """

    forward: Callable[..., tuple[jax.Array, ...]]
    gradient: Callable[..., tuple[Any, ...]] | None = None
    kernel_for: str | None = None
    default_on: tuple[str, ...] = ()
    supports: Callable[..., str | None] = takes_anything


Table = Mapping[str, Implementation]


def _keep_all(arguments, results):
    return arguments, results


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """A function with several implementations.

    Attributes:
      name: name of the function, for errors.
      dims: letters of the dimensions of every array among arguments and results, such
        as "btc,btc,bc->btc,bc"; `meshes.LETTER_ROLES` says what they mean.
      table: entries by name, the best first. At least one is plain JAX, a default
        everywhere and takes anything.
      keep: function of the arguments and results, which replaces by None what no
        gradient needs.
      sample: function of a dtype; small arguments and options, on which kernels show
        that they run.
      on_shards: how the op runs on a sequence that the mesh cuts along time: function of
        the op itself, of the name of the mesh axis, and of the arguments on a device;
        its results there. None leaves such a sequence to the compiler.
    """

    name: str
    dims: str
    table: Table
    keep: Callable[[Any, Any], tuple[Any, Any]] = _keep_all
    sample: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    on_shards: Callable[..., Any] | None = None

    @property
    def plain(self) -> Implementation:
        """The entry that takes over where no kernel can run."""
        return next(
            entry
            for entry in self.table.values()
            if entry.default_on == EVERYWHERE and entry.supports is takes_anything
        )


Choice = tuple[tuple[str, str], ...]
"""Pairs of a platform and the name of the entry that runs there; one pair is for every
platform."""


def call(op: Op, implementation: str | None, *arguments: Any, **options: Any) -> Any:
    """Runs an op, differentiably.

    Args:
      op: the op.
      implementation: a name of the op's table; None is the best for the platform.
      *arguments: positional arguments of the entries, pytrees of arrays.
      **options: keyword arguments of the entries, hashable.

    Raises:
      NotImplementedError: the named implementation does not exist or cannot run.
    """

    def run(*arguments):
        choice = _choose(op, implementation, arguments, options)
        fixed = (op, choice, tuple(options.items()))
        if any(op.table[name].gradient for _, name in choice):
            return _call_with_gradient(*fixed, *arguments)
        return _forward(*fixed, *arguments)

    arguments = meshes.vary_alike(arguments)
    specs = partial(meshes.result_specs, op.dims, arguments)
    if op.on_shards is None:
        return meshes.with_auto_axes(run, specs, *arguments)
    on_shards = partial(op.on_shards, run, **options)
    along_time = partial(meshes.run_along_time, op.dims, run, on_shards)
    return meshes.with_auto_axes(along_time, specs, *arguments)


def forward(op: Op, implementation: str | None, *arguments: Any, **options: Any) -> Any:
    """`call` for an op that is part of another one, which brings the gradient."""
    choice = _choose(op, implementation, arguments, options)
    return _forward(op, choice, tuple(options.items()), *arguments)


def gradient(
    op: Op,
    implementation: str | None,
    arguments: tuple[Any, ...],
    results: tuple[Any, ...],
    upstream: tuple[jax.Array, ...],
    **options: Any,
) -> tuple[Any, ...]:
    """Gradients of an op's arguments; see `Implementation.gradient`."""
    kept = op.keep(arguments, results)
    choice = _choose(op, implementation, arguments, options)
    return _gradient(op, choice, tuple(options.items()), kept, upstream)


def _choose(op, implementation, arguments, options) -> Choice:
    if implementation is not None:
        check_implementation("implementation", implementation, op.table)
        reason = _reason_against(op, implementation, arguments, options)
        if reason:
            raise NotImplementedError(
                f"{op.name}: {implementation} cannot run: {reason}; "
                "leave the choice to implementation=None."
            )
        return ((EVERYWHERE[0], implementation),)
    able = [
        name
        for name, entry in op.table.items()
        if entry.default_on and not _reason_against(op, name, arguments, options)
    ]
    platforms = {p for name in able for p in op.table[name].default_on}
    best = {
        platform: next(
            name
            for name in able
            if {platform, *EVERYWHERE} & set(op.table[name].default_on)
            and _runs_here(op, name, arguments)
        )
        for platform in sorted(platforms)
    }
    everywhere = best[EVERYWHERE[0]]
    others = {platform: name for platform, name in best.items() if name != everywhere}
    return (*others.items(), (EVERYWHERE[0], everywhere))


def _runs_here(op, name, arguments) -> bool:
    """Whether the kernel runs on the GPUs that are here; others need not show it."""
    if op.table[name].kernel_for != gpu.PLATFORM:
        return True
    return gpu.runs(call, op, name, arguments)


def chosen(op: Op, platform: str, *arguments: Any, **options: Any) -> str:
    """The name that `call` without a name picks for a platform.

    Args:
      op: the op.
      platform: "cpu", "tpu", "cuda" or "rocm".
      *arguments, **options: as of `call`; shapes suffice.
    """
    by_platform = dict(_choose(op, None, arguments, options))
    everywhere = by_platform.get(EVERYWHERE[0], next(iter(by_platform.values())))
    return by_platform.get(platform, everywhere)


def _reason_against(op, name, arguments, options) -> str | None:
    entry = op.table[name]
    reason = entry.supports(*arguments, **options)
    if reason or entry.kernel_for is None:
        return reason
    given = meshes.present(meshes.words(op.dims)[0], arguments)
    cut = meshes.plan_cut(meshes.current_mesh([array for _, array in given]), given)
    return cut if isinstance(cut, str) else None


def _forward(op, choice: Choice, options, *arguments):
    def function_of(entry):
        return partial(entry.forward, **dict(options))

    words, results = meshes.words(op.dims)
    return _run(op, choice, function_of, words, results, arguments)


def _gradient(op, choice: Choice, options, kept, upstream):
    def function_of(entry):
        run = entry.gradient or partial(_by_differentiation, entry.forward)
        return partial(run, **dict(options))

    of_arguments, of_results = meshes.words(op.dims)
    leaves = jax.tree.leaves(kept[0], is_leaf=lambda leaf: leaf is None)
    differentiated = [
        word
        for word, leaf in zip(of_arguments, leaves, strict=True)
        if leaf is None or jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    words = [*of_arguments, *of_results, *of_results]
    return _run(op, choice, function_of, words, differentiated, (*kept, upstream), True)


def _by_differentiation(function, arguments, results, upstream, **options):
    """Gradients of an entry without its own, where other platforms' entries have one."""
    del results
    _, pull_back = jax.vjp(partial(function, **options), *arguments)
    return differentiable(pull_back(upstream))


def differentiable(gradients: Any) -> Any:
    """Gradients as `jax.vjp` gives them, with None for those of integers."""
    return jax.tree.map(lambda g: None if g.dtype == float0 else g, gradients)


def _run(op, choice, function_of, words, results, arguments, sum_results=False):
    """The chosen entries' functions of the arguments, by platform."""

    def branch(name, **interpret):
        entry = op.table[name]
        function = function_of(entry)
        if entry.kernel_for is None:
            return function
        kernel, plain = partial(function, **interpret), function_of(op.plain)
        return _kernel(kernel, plain, words, results, sum_results)

    if len(choice) == 1:
        name = choice[0][1]
        platform = op.table[name].kernel_for
        if platform is None:
            return branch(name)(*arguments)
        branches = {"cpu": branch(name, interpret=True), platform: branch(name)}
    else:
        functions = {name: branch(name) for _, name in choice}
        branches = {platform: functions[name] for platform, name in choice}
    return jax.lax.platform_dependent(*arguments, **branches)


def _kernel(kernel, plain, words, results, sum_results):
    """A kernel on the parts of its arrays; derivatives are those of the plain form."""

    @jax.custom_jvp
    def run(*arguments):
        given = meshes.present(words, arguments)
        structure, found_structure = jax.tree.structure(arguments), None

        def flat(*leaves):
            nonlocal found_structure
            found = kernel(*jax.tree.unflatten(structure, leaves))
            found, found_structure = jax.tree.flatten(found)
            return found

        found = meshes.run_cut(flat, given, results, sum_results)
        return jax.tree.unflatten(found_structure, found)

    @run.defjvp
    def _(primals, tangents):
        return jax.jvp(plain, primals, tangents)

    return run


def _call_forward(op, choice, options, *arguments):
    results = _forward(op, choice, options, *arguments)
    return results, op.keep(arguments, results)


_call_with_gradient = precision.custom_vjp(
    _forward, _call_forward, _gradient, static=(0, 1, 2)
)


def imported_late(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when the function is first called.

    Pallas takes a tenth of a second to import, which only its users should pay.
    """

    def run(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    return run


def takes(*dtypes: Any) -> Callable[..., str | None]:
    """An `Implementation.supports` of entries whose floating arrays have these dtypes."""

    def supports(*arguments: Any, **options: Any) -> str | None:
        del options
        for array in jax.tree.leaves(arguments):
            floating = jnp.issubdtype(array.dtype, jnp.floating)
            if floating and array.dtype not in dtypes:
                names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
                return f"it takes {names}, not {array.dtype}"
        return None

    return supports
