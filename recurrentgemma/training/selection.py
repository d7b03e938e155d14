"""Which parameters are trained: patterns of native names."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any


def trained_names(
    names: Iterable[str], train_only: Sequence[str] = (), freeze: Sequence[str] = ()
) -> list[str]:
    """The parameters that are trained, in the order of `names`.

    Args:
      names: all native names, such as `blocks.0.mixer.linear_x.kernel`.
      train_only: patterns (`*`, `?`, `[...]`) of which one must match; none: all do.
      freeze: patterns of which none may match.

    Raises:
      ValueError: a pattern matches nothing, or nothing is left to train.
    """
    names = list(names)
    for argument, patterns in (("train_only", train_only), ("freeze", freeze)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                close = difflib.get_close_matches(pattern, names, n=4, cutoff=0.3)
                raise ValueError(
                    f"{argument}: expected a pattern of names of parameters, got "
                    f"{pattern!r}, which matches none; near it are "
                    f"{', '.join(close or names[:4])}"
                )
    chosen = [
        name
        for name in names
        if (not train_only or _matches(name, train_only)) and not _matches(name, freeze)
    ]
    if not chosen:
        raise ValueError(
            "freeze: expected patterns that leave something to train, got "
            f"{', '.join(freeze)}; with train_only {', '.join(train_only) or '*'} "
            "every parameter is frozen"
        )
    return chosen


def split_parameters(
    params: dict[str, Any], train_only: Sequence[str] = (), freeze: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen) parameters; see `trained_names`."""
    chosen = set(trained_names(params, train_only, freeze))
    trained = {name: leaf for name, leaf in params.items() if name in chosen}
    return trained, {n: leaf for n, leaf in params.items() if n not in chosen}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
