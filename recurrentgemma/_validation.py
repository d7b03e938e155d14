"""Checks of arguments, in one dialect: `name: expected ..., got ...; what to do`.

Each function takes the argument's name and value and returns the value in the type that
the code behind it counts on. All raise ValueError.
"""

import math
import numbers
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

MAX_COUNT = 2**31 - 1
"""Largest number of rows, tokens or channels."""
_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 60
"""Most characters of a value in an error."""


def refuse(name: str, expected: str, value: Any, advice: str = "") -> NoReturn:
    """Raises the ValueError that says what was expected of an argument."""
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = f"{shown[:_SHOWN]}..."
    raise ValueError(
        f"{name}: expected {expected}, got {shown}{advice and f'; {advice}'}"
    )


def integer(
    name: str, value: Any, *, least: int | None = None, most: int | None = None
) -> int:
    """An integer within bounds; NumPy integers are integers, booleans are not."""
    expected = "an integer"
    if least is not None and most is not None:
        expected += f" from {least} to {most}"
    elif least is not None:
        expected += f" of at least {least}"
    elif most is not None:
        expected += f" of at most {most}"
    if isinstance(value, bool | np.bool_):
        refuse(name, expected, value)
    try:
        number = operator.index(value)
    except TypeError:
        refuse(name, expected, value)
    if (least is not None and number < least) or (most is not None and number > most):
        refuse(name, expected, value)
    return number


def positive_integer(name: str, value: Any) -> int:
    """An integer of at least 1, and at most what int32 holds."""
    found = integer(name, value, least=1)
    return integer(name, found, most=MAX_COUNT)


def count(name: str, value: Any) -> int:
    """An integer of at least 0, and at most what int32 holds."""
    return integer(name, value, least=0, most=MAX_COUNT)


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> float:
    """A number within bounds, as a float; finite, in float32 too.

    Args:
      name: of the argument.
      value: an integer or a float; no boolean, no text.
      above: it must be larger than this.
      least: it must not be smaller than this.
      most: it must not be larger than this.
    """
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("above", above), ("at least", least), ("at most", most))
        if bound is not None
    ]
    expected = " ".join(["a finite number", " and ".join(bounds)]).rstrip()
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        found = float(value) if is_number else math.nan
    except OverflowError:
        found = math.inf
    if (
        not -_LARGEST <= found <= _LARGEST
        or (above is not None and not found > above)
        or (least is not None and found < least)
        or (most is not None and found > most)
    ):
        refuse(name, expected, value)
    return found


def boolean(name: str, value: Any) -> bool:
    """True or False; nothing else counts as one."""
    if not isinstance(value, bool | np.bool_):
        refuse(name, "True or False", value)
    return bool(value)


def string(name: str, value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        refuse(name, "a text that is not empty", value)
    return value


def choice(name: str, value: Any, choices: Iterable[str], advice: str = "") -> str:
    """One of these names."""
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        refuse(name, f"one of {', '.join(names)}", value, advice)
    return value


def token_ids(name: str, values: Any, vocab_size: int) -> list[int]:
    """A sequence or an array of token ids below vocab_size; it may be empty."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        refuse(name, "a text or a list of token ids", values)
    for value in values:
        is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_integer or not 0 <= int(value) < vocab_size:
            refuse(name, f"tokens in [0, {vocab_size})", value)
    return [int(value) for value in values]


def array(name: str, value: Any, expected: str) -> np.ndarray:
    """The value as a NumPy array, which a ragged list has none of."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        refuse(name, expected, value)


def indices(name: str, value: Any, count: int) -> np.ndarray:
    """A list or an array of at least one integer from 0 to count - 1."""
    expected = f"a list of at least one index from 0 to {count - 1}"
    found = array(name, value, expected)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        refuse(name, expected, value)
    if np.any((found < 0) | (found >= count)):
        refuse(name, expected, value)
    return found.astype(np.int32)


def floating_dtype(name: str, value: Any) -> np.dtype:
    """A floating-point dtype that JAX computes in."""
    expected = "a floating-point dtype such as float32, bfloat16 or float16"
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        refuse(name, expected, value)
    if value is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4:
        refuse(name, expected, value)
    return dtype


def is_series(value: Any) -> bool:
    """Whether the items of a value can be taken; those of a text never are."""
    return (
        isinstance(value, Iterable)
        and not isinstance(value, str | bytes)
        and getattr(value, "ndim", 1) > 0
    )


def series(name: str, value: Any, expected: str) -> Iterable[Any]:
    """A list, an array with a dimension, or anything else whose items can be taken."""
    if not is_series(value):
        refuse(name, expected, value)
    return value


def path(name: str, value: Any) -> Path:
    """A path: a text that is not empty, or an `os.PathLike` of one."""
    expected = "a path"
    try:
        text = os.fspath(value)
    except TypeError:
        refuse(name, expected, value)
    if not isinstance(text, str) or not text:
        refuse(name, expected, value)
    return Path(text)


def function(name: str, value: Any) -> Any:
    """Something to be called, or None."""
    if value is not None and not callable(value):
        refuse(name, "a function or None", value)
    return value


def instance(name: str, value: Any, kind: type, expected: str) -> Any:
    """A value of a class."""
    if not isinstance(value, kind):
        refuse(name, expected, value)
    return value


def strings(name: str, values: Any) -> tuple[str, ...]:
    """Any iterable of strings, none of them empty; read once."""
    expected = "a list of strings, none of them empty"
    values = tuple(series(name, values, expected))
    for value in values:
        if not isinstance(value, str) or not value:
            refuse(name, expected, values)
    return values
