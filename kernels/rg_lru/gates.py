"""The gates of the RG-LRU before their sigmoids: block-diagonal matrix products."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import einsum_float32


class Gate(NamedTuple):
    """Parameters of a gate: G diagonal blocks of a matrix of G * in x G * out."""

    kernel: jax.Array
    """[G, in, out], floating point; multiplied in the dtype of the inputs."""
    bias: jax.Array
    """[G, out], floating point."""


def logits(x: jax.Array, gate: Gate) -> jax.Array:
    """x times a block-diagonal matrix, plus a bias.

    Args:
      x: [B, T, G * in], floating point.
      gate: of G blocks.

    Returns:
      [B, T, G * out] in x's dtype; products are accumulated in float32.
    """
    blocks = x.reshape(*x.shape[:2], gate.kernel.shape[0], -1)
    kernel = gate.kernel.astype(x.dtype)
    product = einsum_float32("btgi,gio->btgo", blocks, kernel)
    y = product + gate.bias.astype(product.dtype)[None, None]
    return y.astype(x.dtype).reshape(*x.shape[:2], -1)


def logits_gradients(
    x: jax.Array, gate: Gate, upstream: jax.Array
) -> tuple[jax.Array, Gate]:
    """Gradients of `logits`, in float32.

    Args:
      x, gate: its arguments.
      upstream: gradient of the logits [B, T, G * out], floating point.

    Returns:
      Of x [B, T, G * in]; and of the gate, for each row: [B, G, in, out], [B, G, out].
    """
    groups = gate.kernel.shape[0]
    kernel = gate.kernel.astype(x.dtype)
    inputs, upstream = (
        array.reshape(*x.shape[:2], groups, -1) for array in (x, upstream)
    )
    of_x = einsum_float32("btgo,gio->btgi", upstream, kernel).reshape(x.shape)
    of_kernel = einsum_float32("btgi,btgo->bgio", inputs, upstream)
    return of_x, Gate(of_kernel, jnp.sum(upstream.astype(jnp.float32), axis=1))
