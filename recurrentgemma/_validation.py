"""Checks of arguments, in one dialect: `name: expected ..., got ...; what to do`.

Each function takes the argument's name and value and returns the value in the type that
the code behind it counts on. All raise ValueError.
"""

import numbers
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from recurrentgemma.kernels.checks import MAX_COUNT, integer, number, refuse

__all__ = ["MAX_COUNT", "integer", "number", "refuse"]


def positive_integer(name: str, value: Any) -> int:
    """An integer of at least 1, and at most what int32 holds."""
    found = integer(name, value, least=1)
    return integer(name, found, most=MAX_COUNT)


def count(name: str, value: Any) -> int:
    """An integer of at least 0, and at most what int32 holds."""
    return integer(name, value, least=0, most=MAX_COUNT)


def share(name: str, value: Any) -> float:
    """A number of at least 0 and below 1."""
    found = number(name, value, least=0)
    if not found < 1:
        refuse(name, "a number of at least 0 and below 1", value)
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
