"""Checks of public arguments: one function for each kind, one dialect for errors.

    name: expected ..., got ...; what to do

Every function returns the value as the plain Python type that it checked for.
"""

import math
import numbers
from collections.abc import Iterable
from typing import Any

_SHOWN = 60


def fail(name: str, expected: str, got: object) -> ValueError:
    """The error of an argument; what came is cut to a readable length."""
    shown = repr(got)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return ValueError(f"{name}: expected {expected}, got {shown}")


def integer(
    name: str, value: Any, *, minimum: int | None = None, maximum: int | None = None
) -> int:
    """An integer of any integer type, bool excluded, from minimum to maximum."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if (
        not is_integer
        or (minimum is not None and int(value) < minimum)
        or (maximum is not None and int(value) > maximum)
    ):
        raise fail(name, f"an integer{_range(minimum, maximum)}", value)
    return int(value)


def number(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> float:
    """A finite real number, bool excluded: at least `minimum`, more than `above`."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if (
        not is_number
        or not math.isfinite(value)
        or (minimum is not None and float(value) < minimum)
        or (above is not None and float(value) <= above)
        or (maximum is not None and float(value) > maximum)
    ):
        low = _range(minimum, maximum) if above is None else f" above {above}"
        raise fail(name, f"a finite number{low}", value)
    return float(value)


def instance(name: str, value: Any, kind: type, expected: str) -> Any:
    """A value of a class."""
    if not isinstance(value, kind):
        raise fail(name, expected, value)
    return value


def strings(name: str, values: Iterable[str]) -> tuple[str, ...]:
    """Any iterable of strings, none of them empty; read once."""
    expected = "a list of strings, none of them empty"
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise fail(name, expected, values)
    values = tuple(values)
    for value in values:
        if not isinstance(value, str) or not value:
            raise fail(name, expected, values)
    return values


def _range(minimum, maximum) -> str:
    if maximum is None:
        return "" if minimum is None else f" of at least {minimum}"
    return (
        f" of at most {maximum}" if minimum is None else f" in [{minimum}, {maximum}]"
    )
