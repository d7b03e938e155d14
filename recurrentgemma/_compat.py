"""Everything that differs between the supported versions of jax and flax.

Oldest: jax 0.7.2 with flax 0.11.2. Nothing else in the package asks for a version.
"""

from typing import Any

from flax import nnx

# Before flax 0.12 a plain list of modules is part of the pytree, and `nnx.List` is
# missing; from 0.12 a plain list that holds modules is refused.
ModuleList: Any = getattr(nnx, "List", list)


def value_of(variable: Any) -> Any:
    """What a variable holds, also where that is not an array."""
    # flax 0.11 has the property alone, which later versions deprecate.
    if hasattr(nnx.Variable, "get_raw_value"):
        return variable.get_raw_value()
    return variable.raw_value
