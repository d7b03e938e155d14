"""Which implementation of an op runs, and the one matrix product they all share."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    platform_defaults: Mapping[str, str],
    implementation: str | None,
    *args: Any,
) -> Any:
    """Runs one implementation of an op on `args`.

    Args:
      op: the op's name, for errors.
      implementations: the op's table, name -> function; all of one signature.
      platform_defaults: platform ("cpu", "cuda", "tpu", ...) -> name; the key "default"
        is every platform that is not listed.
      implementation: a name of the table, or None for the platform's default. The
        platform is the one compiled for, not the one that traces.
      *args: positional arguments of the implementations; arrays, None, or pytrees.

    Raises:
      NotImplementedError: there is no such implementation.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise NotImplementedError(
                f"{op} has no implementation {implementation!r}; it has "
                f"{', '.join(sorted(implementations))}."
            )
        return implementations[implementation](*args)
    by_platform = {
        platform: implementations[name] for platform, name in platform_defaults.items()
    }
    if len(set(by_platform.values())) == 1:
        return by_platform["default"](*args)
    return jax.lax.platform_dependent(*args, **by_platform)


def einsum_float32(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """einsum in the operands' dtype, accumulated and returned in float32.

    On CPU the operands are widened first: XLA has no batched bfloat16 product with a
    float32 result there.
    """

    def native(left, right):
        return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)

    def widened(left, right):
        return jnp.einsum(spec, left.astype(jnp.float32), right.astype(jnp.float32))

    if left.dtype == right.dtype == jnp.float32:
        return native(left, right)
    return jax.lax.platform_dependent(left, right, cpu=widened, default=native)
