"""Whether every op is right on the device: one definition, for command and tests.

The truth is the op's `reference` in float32 on the CPU, of the inputs as they were rounded
to the dtype. An error is the RMS of the difference over that of the truth, channel by
channel (the last axis) of a sequence: the gradient of a slow channel is a thousandth of
the others'. Compared are all results and the gradients of all floating-point arguments.
Two runs have to give the same bits.
"""

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma.benchmarks import device
from recurrentgemma.benchmarks.device_suite.cases import CASES, Arguments, Case
from recurrentgemma.benchmarks.device_suite.pieces import DEFAULT, Piece, Wrong
from recurrentgemma.benchmarks.device_suite.sizes import Size
from recurrentgemma.benchmarks.models import check_memory, needed_bytes
from recurrentgemma.benchmarks.report import Row
from recurrentgemma.kernels import linear_scan
from recurrentgemma.kernels.dispatch import Table
from recurrentgemma.kernels.linear_scan import IMPLEMENTATIONS as LINEAR_SCANS

TOLERANCES = {
    # Below what one pass of TensorFloat-32 (2^-11) or bfloat16 costs a product, and above
    # the rounding of some thousand sums.
    "float32": 5e-5,
    # Results are rounded to 8 and to 11 bits, and so are the logits of gates, the weights
    # of attention, and the states inside a gradient.
    "bfloat16": 4e-2,
    "float16": 5e-3,
}
"""Relative RMS error that a channel of an op may have, by dtype. `model_checks.py` has
those of whole models."""
MANY_STEPS_TOLERANCE = 1e-3
"""After 1e5 products with one decay, which without fused multiply-add round alike."""
SMALLEST_SCALE = 1e-4
"""Share of the RMS of an array below which a channel counts as zero."""
LEAST_OF_CHANNEL = 16
"""Fewest entries of a channel that are compared apart: of fewer, one may be near 0."""
LARGE = "larger than 4 GiB"
LARGE_ROW_BYTES = 1 << 27
"""Bytes of a row of the large array."""
COMPARED_CHANNELS = 128
STEP_BY_STEP = ("sequential", "reference")
"""Left out of many steps: seconds of an accelerator, where a step is a launch."""


def pieces(size: Size, platform: str) -> Iterator[Piece]:
    """Every check: of what runs by default first, then by name.

    Args:
      size: sizes.
      platform: as `device.platform` gives it. Kernels for another one are left out,
        except on a CPU, which interprets them.
    """
    for by_default in (True, False):
        for case in CASES:
            for dtype in case.dtypes:
                for name in _names(case, platform, by_default):
                    yield Piece(
                        "check",
                        case.program,
                        name,
                        dtype,
                        partial(check, case, name, dtype, size),
                    )
        for name in names_here(LINEAR_SCANS, platform, by_default):
            work = partial(check_large, name, size)
            yield Piece("check", f"linear_scan: {LARGE}", name, "float32", work)


def _names(case: Case, platform: str, by_default: bool) -> list[str]:
    names = names_here(case.table, platform, by_default)
    if not case.many_steps or platform == "cpu":
        return names
    return [name for name in names if name not in STEP_BY_STEP]


def names_here(table: Table, platform: str, by_default: bool) -> list[str]:
    """The word "default" alone, or the names of a table's entries for a platform."""
    if by_default:
        return [DEFAULT]
    here = (None, platform)
    return [
        name
        for name, entry in table.items()
        if platform == "cpu" or entry.kernel_for in here
    ]


def check(case: Case, name: str, dtype: str, size: Size) -> Row:
    """Compares an implementation with the truth.

    Args:
      case: the op and its inputs.
      name: of the implementation, or "default".
      dtype: of activations and matrices.
      size: sizes.

    Returns:
      The largest errors, by result and by gradient.

    Raises:
      Wrong: an error is too large, or two runs differ.
      NotImplementedError: the implementation cannot run this case.
    """
    arguments, upstream, expected = _truth(case, dtype, size)
    run = jax.jit(partial(_evaluate, _function(case, name, size)))
    on_device = jax.device_put((arguments, upstream))
    found, again = (_on_host(run(*on_device)) for _ in range(2))
    errors = {key: relative_error(found[key], expected[key]) for key in expected}
    worst = worst_of(errors)
    row = error_figures(errors)
    limit = MANY_STEPS_TOLERANCE if case.many_steps else TOLERANCES[dtype]
    if not errors[worst] <= limit:  # true of NaN too
        bad = [key for key, error in errors.items() if not error <= limit]
        raise Wrong(
            f"{', '.join(bad)}: relative RMS error of a channel up to "
            f"{errors[worst]:.2g}, expected at most {limit:.2g}",
            row,
        )
    changed = [key for key in found if found[key].tobytes() != again[key].tobytes()]
    if changed:
        raise Wrong(f"{', '.join(changed)}: two runs differ in their bits", row)
    return row


def worst_of(errors: dict[str, float]) -> str:
    """The name of the largest error; NaN is larger than any number."""
    return max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))


def error_figures(errors: dict[str, float]) -> Row:
    """Errors by name for a row, with the largest; None is what JSON has no number for."""
    shown = {name: e if np.isfinite(e) else None for name, e in errors.items()}
    worst = worst_of(errors)
    return {"error": shown[worst], "worst": worst, "errors": shown}


@functools.cache
def _truth(case, dtype, size) -> tuple[Arguments, Any, dict[str, np.ndarray]]:
    """Inputs, gradients of the results, and results and gradients by name."""
    arguments = case.arguments(size, dtype)
    shapes = jax.eval_shape(_function(case, "reference", size), **arguments)
    random = np.random.default_rng(1)
    upstream = {
        key: random.standard_normal(value.shape, np.float32).astype(value.dtype)
        for key, value in shapes.items()
        if _is_floating(value)
    }
    with jax.default_device(truth_device()), jax.default_matmul_precision("highest"):
        run = jax.jit(partial(_evaluate, _function(case, "reference", size)))
        expected = _on_host(run(*jax.tree.map(_widened, (arguments, upstream))))
    return arguments, upstream, expected


def truth_device() -> Any:
    """The CPU; the default device where jax has no other."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]


def _function(case: Case, name: str, size: Size):
    implementation = None if name == DEFAULT else name
    return partial(case.call, implementation, **case.options(size))


def _evaluate(function, arguments, upstream):
    """Results, and gradients of the floating-point leaves, by name."""
    given, structure = jax.tree_util.tree_flatten_with_path(arguments)
    varied = {_name(path): leaf for path, leaf in given if _is_floating(leaf)}

    def run(varied):
        leaves = [varied.get(_name(path), leaf) for path, leaf in given]
        found = function(**jax.tree.unflatten(structure, leaves))
        return {key: found[key] for key in upstream}, found

    # Apart: a derivative may take another way to the results.
    _, found = run(varied)
    _, pull_back, _ = jax.vjp(run, varied, has_aux=True)
    (gradients,) = pull_back(upstream)
    return found | {f"gradient of {key}": leaf for key, leaf in gradients.items()}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_floating(array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _widened(array):
    return array.astype(np.float32) if _is_floating(array) else array


def _on_host(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {key: np.asarray(array) for key, array in arrays.items()}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative RMS error of a channel; NaN if anything is not finite.

    Args:
      actual, expected: arrays of one shape; the last axis is the channel. Integers have
        an error of 0 or 1.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"expected shape {expected.shape}, got {actual.shape}")
    if not _is_floating(expected):
        return float(np.any(actual != expected))
    actual, expected = (array.astype(np.float64) for array in (actual, expected))
    if expected.size < LEAST_OF_CHANNEL * expected.shape[-1]:
        actual, expected = actual.reshape(-1, 1), expected.reshape(-1, 1)
    axes = tuple(range(expected.ndim - 1))
    scale = np.sqrt(np.mean(expected**2, axis=axes))
    whole = np.sqrt(np.mean(expected**2))
    if whole == 0:
        return float(np.abs(actual).max())
    error = np.sqrt(np.mean((actual - expected) ** 2, axis=axes))
    return float(np.max(error / np.maximum(scale, SMALLEST_SCALE * whole)))


def check_large(name: str, size: Size) -> Row:
    """Compares the last channels of the last row of an array of more than 4 GiB.

    Args:
      name: of an implementation of `linear_scan`, or "default".
      size: sizes; x, the decays and y have more than `large_bytes` each.

    Raises:
      OutOfMemory: the device is too small for them.
      Wrong: the result is wrong.
    """
    factors = _large_factors(size)
    implementation = None if name == DEFAULT else name
    compiled = (
        jax.jit(partial(linear_scan, implementation=implementation))
        .lower(*jax.eval_shape(_large_arrays, *factors))
        .compile()
    )
    check_memory(needed_bytes(compiled), device.memory_bytes())
    y, h_last = compiled(*jax.jit(_large_arrays)(*factors))
    found = y[-1:, :, -COMPARED_CHANNELS:], h_last[-1:, -COMPARED_CHANNELS:]
    with jax.default_device(truth_device()):
        last = [factor[-1:] for factor in factors[:2]]
        last += [factor[-COMPARED_CHANNELS:] for factor in factors[2:]]
        expected = jax.jit(partial(linear_scan, implementation="reference"))(
            *_large_arrays(*last)
        )
    errors = {
        key: relative_error(np.asarray(actual), np.asarray(right))
        for key, actual, right in zip(("y", "h_last"), found, expected, strict=True)
    }
    row, worst = error_figures(errors) | {"bytes": y.nbytes}, worst_of(errors)
    if not errors[worst] <= TOLERANCES["float32"]:  # true of NaN too
        raise Wrong(f"{worst}: relative RMS error {errors[worst]:.2g} at its end", row)
    return row


def _large_factors(size: Size) -> list[np.ndarray]:
    """x and the decays are products of a factor [B, T] and one [D]: two of each."""
    width = 16 * COMPARED_CHANNELS
    row_bytes = min(LARGE_ROW_BYTES, size.large_bytes // 4)
    length = row_bytes // (4 * width) + 1
    rows = size.large_bytes // (4 * width * length) + 1
    random = np.random.default_rng(2)
    of_steps = random.uniform(0.5, 1.0, (2, rows, length))
    of_channels = random.uniform(-1.0, 1.0, (2, width))
    return [factor.astype(np.float32) for factor in (*of_steps, *of_channels)]


def _large_arrays(x_steps, a_steps, x_channels, a_channels):
    x = x_steps[..., None] * x_channels[None, None]
    return x, 0.9 + 0.0999 * a_steps[..., None] * a_channels[None, None]
