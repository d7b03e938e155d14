"""The gates of the RG-LRU before their sigmoids: block-diagonal matrix products."""

from typing import NamedTuple

import jax

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
