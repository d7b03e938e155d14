"""The checks of the ops' arguments: one sentence an error."""

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

MAX_COUNT = 2**31 - 1
"""Largest number of tokens; positions are int32."""
MAX_NUMBER = float(jnp.finfo(jnp.float32).max)
_SHOWN = 60
"""Most characters of a value in an error."""


def check_array(name: str, value: Any) -> None:
    """Raises a ValueError unless this is an array, traced or not."""
    if not all(hasattr(value, part) for part in ("shape", "ndim", "dtype")):
        _refuse(name, "an array", value, "make it one.")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raises a ValueError unless the value is of a class of these ops."""
    if not isinstance(value, kind):
        _refuse(name, f"a {kind.__name__}", value, "make one of its arrays.")


def check_switch(name: str, value: Any) -> None:
    """Raises a ValueError unless the value is a boolean."""
    if not isinstance(value, bool):
        _refuse(name, "True or False", value, "nothing else stands for one.")


def check_number(name: str, value: Any, *, above: float = -math.inf) -> float:
    """The value; a ValueError unless it is a finite number above a bound."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not above < value <= MAX_NUMBER or value < -MAX_NUMBER:
        bound = "" if above == -math.inf else f" above {above:g}"
        _refuse(name, f"a finite float32 number{bound}", value, "give one.")
    return float(value)


def check_count(name: str, value: Any, advice: str) -> None:
    """Raises a ValueError unless the value is an integer of at least 1."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if not 1 <= count <= MAX_COUNT:
        _refuse(name, f"an integer from 1 to {MAX_COUNT}", value, advice)


def check_implementation(name: str, value: Any, table: Mapping[str, Any]) -> None:
    """Raises a NotImplementedError unless the value names an entry of a table."""
    if not isinstance(value, str) or value not in table:
        names = ", ".join(sorted(table))
        _refuse(
            name, f"one of {names}", value, "None is the best.", NotImplementedError
        )


def _refuse(name, expected, value, advice, error=ValueError) -> NoReturn:
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    raise error(f"{name}: expected {expected}, got {shown}; {advice}")


def check_sequence(x: jax.Array, dims: str) -> None:
    """Raises a ValueError unless x has these dimensions, such as "B, T, D"."""
    check_array("x", x)
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
        check_array(name, array)
        if array.shape == shape and jnp.issubdtype(array.dtype, dtype):
            continue
        kind = getattr(dtype, "__name__", dtype)
        raise ValueError(
            f"{name}: expected {kind} {shape}, got {array.dtype} {array.shape}; "
            "cast or reshape it to fit the other arguments."
        )
