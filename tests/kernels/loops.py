"""How often the loops of a function turn on a platform, read from its jaxpr."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def turns(function: Callable[..., Any], *shapes: Any, platform: str) -> int:
    """Number of turns of all loops, each of known length."""
    return _turns(jax.make_jaxpr(function)(*shapes).jaxpr, platform)


def _turns(jaxpr, platform) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        assert name != "while", f"a loop of unknown length: {equation}"
        within = sum(_turns(part, platform) for part in _parts(equation, platform))
        is_loop = name == "scan"
        total += equation.params["length"] * (1 + within) if is_loop else within
    return total


def _parts(equation, platform) -> Iterator[Any]:
    """The jaxprs inside an equation: of a choice by platform, the platform's."""
    parameters = equation.params
    values = [*parameters.values(), *parameters.get("branches", ())]
    if platforms := parameters.get("branches_platforms"):
        chosen = [i for i, names in enumerate(platforms) if platform in (names or ())]
        index = chosen[0] if chosen else platforms.index(None)
        values = [parameters["branches"][index]]
    for value in values:
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            yield jaxpr
