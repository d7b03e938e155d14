"""Precision of matrix products: float32 operands are multiplied as float32, everywhere.

Left to themselves, accelerators multiply float32 operands in fewer digits: TPUs in one
pass of bfloat16, NVIDIA GPUs in TF32. Here such products take the highest precision. A
caller's `jax.default_matmul_precision(...)` changes that, for the gradient of an op too.
Operands of 16 bits are multiplied as they are, whatever the caller has set.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision


def precision_of(*operands: jax.Array) -> Precision | None:
    """Precision of a product outside of kernels; None is what the caller has set."""
    if jnp.result_type(*operands) != jnp.float32:
        return Precision.DEFAULT
    return Precision.HIGHEST if _ambient() is None else None


def kernel_precision_of(*operands: jax.Array) -> Precision:
    """Precision of a product in a Pallas kernel for TPU, which has two of them.

    What the caller has set to anything between the two means the higher one.
    """
    ambient = _ambient()
    if jnp.result_type(*operands) != jnp.float32 or ambient in FASTEST:
        return Precision.DEFAULT
    return Precision.HIGHEST


FASTEST = ("default", "fastest", "bfloat16", "BF16_BF16_F32")
"""Names for one pass of bfloat16, as `jax.default_matmul_precision` takes them."""


def custom_vjp(
    run: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    static: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """`jax.custom_vjp` whose functions all see the precision set where it is called.

    JAX traces the function for the gradient later, when the caller's
    `jax.default_matmul_precision` is no longer in force; here it is set again.

    Args:
      run: the function.
      forward, backward: as for `defvjp` of it.
      static: as `nondiff_argnums` of it.
    """

    def in_force(function):
        def call(precision, *arguments):
            with jax.default_matmul_precision(precision):
                return function(*arguments)

        return call

    op = jax.custom_vjp(
        in_force(run), nondiff_argnums=(0, *(index + 1 for index in static))
    )
    op.defvjp(in_force(forward), in_force(backward))
    return lambda *arguments: op(_ambient(), *arguments)


def einsum_float32(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """einsum in the operands' dtype, accumulated and returned in float32.

    On CPU the operands are widened first: XLA has no batched bfloat16 product with a
    float32 result there.
    """
    precision = precision_of(left, right)

    def native(left, right):
        return jnp.einsum(
            spec, left, right, precision=precision, preferred_element_type=jnp.float32
        )

    def widened(left, right):
        wide = left.astype(jnp.float32), right.astype(jnp.float32)
        return jnp.einsum(spec, *wide, precision=precision)

    if left.dtype == right.dtype == jnp.float32:
        return native(left, right)
    return jax.lax.platform_dependent(left, right, cpu=widened, default=native)


def _ambient() -> str | None:
    return jax.config.jax_default_matmul_precision
