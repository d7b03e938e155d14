"""The GPU that programs are compiled for, and whether a kernel of ours runs on it.

A kernel for GPU is chosen without a name where the cards can run it, and where it has
shown so: it runs once in a process on a small input, forward and backward, and its
numbers are compared with those of the plain form. Older cards (Triton wants compute
capability 8.0), other makers' cards, a jax without this back end, a compiler that
refuses: the plain form runs.
"""

import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

PLATFORM = "cuda"
LEAST_CAPABILITY = (8, 0)
"""What Triton compiles for: Ampere and later, not V100 and T4."""
LEAST_CAPABILITY_OF_MOSAIC, LEAST_JAX_OF_MOSAIC = (9, 0), (0, 10)
"""What jax 0.10.2 compiles Mosaic GPU for; for older cards its compiler ends the process.
jax 0.7.2 lowers less."""
TOLERANCES = {4: 1e-3, 2: 5e-2}
"""Largest difference from the plain form by bytes of an element, as a part of the
largest value. A kernel that is wrong is further away than one that rounds."""
_log = logging.getLogger(__name__)


def devices() -> Sequence[jax.Device]:
    """The NVIDIA GPUs of this process; none where jax has not been given any.

    This asks jax for its back ends, which it makes itself whenever it lowers a program,
    for any platform. With JAX_PLATFORMS=cpu it makes none for a GPU.
    """
    try:
        return jax.local_devices(backend=PLATFORM)
    except RuntimeError:
        return ()


def capability() -> tuple[int, int] | None:
    """The compute capability of the oldest of `devices`; None if it is not known."""
    found = [getattr(device, "compute_capability", None) for device in devices()]
    if not found or None in found:
        return None
    return min(_version(text) for text in found)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def against_mosaic() -> str | None:
    """Why the Mosaic GPU back end cannot be used here, or None."""
    if jax.__version_info__ < LEAST_JAX_OF_MOSAIC:
        least = ".".join(map(str, LEAST_JAX_OF_MOSAIC))
        return f"Mosaic GPU wants jax {least}, not {jax.__version__}"
    version, least = capability(), LEAST_CAPABILITY_OF_MOSAIC
    if version is not None and version < least:
        return "Mosaic GPU wants compute capability {}.{}, not {}.{}".format(
            *least, *version
        )
    return None


def runs(call: Any, op: Any, name: str, arguments: Any) -> bool:
    """Whether the kernel of this name may be chosen on the GPUs that are here.

    Args:
      call: `dispatch.call`.
      op: the op.
      name: of an entry of its table.
      arguments: those of the op, of which the dtypes matter.
    """
    version = capability()
    if version is None or version < LEAST_CAPABILITY:
        return False
    first = jax.tree.leaves(arguments)[0]
    return _has_shown(call, op, name, jnp.dtype(first.dtype))


@functools.cache
def _has_shown(call, op, name, dtype) -> bool:
    """Whether the kernel's numbers are those of the plain form; looked at once."""
    reasons = []

    def compare():
        try:
            reasons.append(_difference(call, op, name, dtype))
        except Exception as error:  # noqa: BLE001 - whatever a compiler comes up with
            reasons.append(f"{type(error).__name__}: {error}")

    # A thread begins without the caller's traces, meshes and precisions.
    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    if reasons[0]:
        _log.warning(
            "%s: the plain form runs instead of %s for %s: %s",
            *(op.name, name, dtype.name, reasons[0]),
        )
    return not reasons[0]


def _difference(call, op, name, dtype) -> str | None:
    """What is wrong with the kernel's numbers, or None."""
    plain = next(key for key, entry in op.table.items() if entry is op.plain)
    arguments, options = op.sample(dtype)
    arguments = jax.device_put(arguments, devices()[0])

    def results_and_gradients(name, *arguments):
        run = functools.partial(call, op, name, **options)
        results, pull_back = jax.vjp(run, *arguments)
        return results, pull_back(results)

    found, expected = (
        jax.tree.leaves(
            jax.jit(results_and_gradients, static_argnums=0)(key, *arguments)
        )
        for key in (name, plain)
    )
    for array, right in zip(found, expected, strict=True):
        if not jnp.issubdtype(right.dtype, jnp.floating):
            continue
        array, right = array.astype(jnp.float32), right.astype(jnp.float32)
        least = jnp.finfo(jnp.float32).tiny
        scale = jnp.maximum(jnp.max(jnp.abs(right)), least)
        error = float(jnp.max(jnp.abs(array - right)) / scale)
        if not error <= TOLERANCES[dtype.itemsize]:  # true of NaN too
            return f"it is off by {error:.2g} of the largest value"
    return None
