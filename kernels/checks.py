"""The checks of the ops' arguments: `name: expected ..., got ...; what to do`.

All raise ValueError unless they say otherwise.
"""

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

MAX_COUNT = 2**31 - 1
"""Largest number of rows, tokens or channels; positions are int32."""
_MAX_NUMBER = float(jnp.finfo(jnp.float32).max)
_SHOWN = 60
"""Most characters of a value in an error."""


def refuse(
    name: str, expected: str, value: Any, advice: str = "", error: type = ValueError
) -> NoReturn:
    """Raises the error that says what was expected of an argument."""
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    raise error(f"{name}: expected {expected}, got {shown}{advice and f'; {advice}'}")


def integer(
    name: str,
    value: Any,
    *,
    least: int | None = None,
    most: int | None = None,
    advice: str = "",
) -> int:
    """An integer within bounds; NumPy integers are integers, booleans are not."""
    expected = "an integer"
    if least is not None and most is not None:
        expected += f" from {least} to {most}"
    elif least is not None:
        expected += f" of at least {least}"
    elif most is not None:
        expected += f" of at most {most}"
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if (
        found is None
        or (least is not None and found < least)
        or (most is not None and found > most)
    ):
        refuse(name, expected, value, advice)
    return found


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> float:
    """An integer or a float within bounds, as a float; finite, in float32 too."""
    bounds = {"above": above, "at least": least, "at most": most}
    words = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        found = float(value) if is_number else math.nan
    except OverflowError:
        found = math.inf
    if (
        not -_MAX_NUMBER <= found <= _MAX_NUMBER
        or (above is not None and not found > above)
        or (least is not None and found < least)
        or (most is not None and found > most)
    ):
        expected = " ".join(["a finite number", " and ".join(words)]).rstrip()
        refuse(name, expected, value)
    return found


def check_array(name: str, value: Any) -> None:
    """Raises a ValueError unless this is an array, traced or not."""
    if not all(hasattr(value, part) for part in ("shape", "ndim", "dtype")):
        refuse(name, "an array", value, "make it one.")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raises a ValueError unless the value is of a class of these ops."""
    if not isinstance(value, kind):
        refuse(name, f"a {kind.__name__}", value, "make one of its arrays.")


def check_switch(name: str, value: Any) -> None:
    """Raises a ValueError unless the value is a boolean."""
    if not isinstance(value, bool):
        refuse(name, "True or False", value, "nothing else stands for one.")


def check_implementation(name: str, value: Any, table: Mapping[str, Any]) -> None:
    """Raises a NotImplementedError unless the value names an entry of a table."""
    if not isinstance(value, str) or value not in table:
        names = ", ".join(sorted(table))
        refuse(name, f"one of {names}", value, "None is the best.", NotImplementedError)


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
