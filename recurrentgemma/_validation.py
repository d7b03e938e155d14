"""Checks of arguments, in one dialect: `name: expected ..., got ...; what to do`.

Each function takes the argument's name and value and returns the value in the type that
the code behind it counts on. All raise ValueError.
"""

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

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
    """An integer of at least 1."""
    return integer(name, value, least=1)


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> float:
    """A finite number within bounds, as a float.

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
    if not is_number or not math.isfinite(value):
        refuse(name, expected, value)
    found = float(value)
    if (
        (above is not None and not found > above)
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


def token_ids(name: str, value: Any, vocab_size: int) -> list[int]:
    """A sequence of token ids below vocab_size: a list, a tuple or a NumPy array."""
    expected = f"token ids from 0 to {vocab_size - 1}"
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        refuse(name, expected, value)
    ids = []
    for i, item in enumerate(value):
        ids.append(integer(f"{name}[{i}]", item, least=0, most=vocab_size - 1))
    return ids


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


def instance(name: str, value: Any, kind: type, expected: str) -> Any:
    """A value of a class."""
    if not isinstance(value, kind):
        refuse(name, expected, value)
    return value


def strings(name: str, values: Any) -> tuple[str, ...]:
    """Any iterable of strings, none of them empty; read once."""
    expected = "a list of strings, none of them empty"
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        refuse(name, expected, values)
    values = tuple(values)
    for value in values:
        if not isinstance(value, str) or not value:
            refuse(name, expected, values)
    return values
