"""The checks of the ops' arguments: shapes and dtypes, one sentence an error."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def check_sequence(x: jax.Array, dims: str) -> None:
    """Raises a ValueError unless x has these dimensions, such as "B, T, D"."""
    if x.ndim != len(dims.split(", ")) or 0 in x.shape[:2]:
        raise ValueError(
            f"x: expected shape [{dims}] with B >= 1 and T >= 1, got {x.shape}; "
            "add the missing axis, or skip the call for an empty chunk."
        )


def check_arrays(expected: Mapping[str, tuple[jax.Array, Any, Any]]) -> None:
    """Raises a ValueError at the first array that is not as expected.

    Args:
      expected: array, shape and dtype (or kind of dtype) of each argument, by its name.
    """
    for name, (array, shape, dtype) in expected.items():
        if array.shape == shape and jnp.issubdtype(array.dtype, dtype):
            continue
        kind = getattr(dtype, "__name__", dtype)
        raise ValueError(
            f"{name}: expected {kind} {shape}, got {array.dtype} {array.shape}; "
            "cast or reshape it to fit the other arguments."
        )
