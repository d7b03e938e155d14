"""The gates of the RG-LRU before their sigmoids: block-diagonal matrix products.

Blocks come first while they are multiplied. Left to choose, the compilers for CPU and TPU
put time last and transpose every sequence, element by element, before and after: on two
CPU cores the RG-LRU with its gates then takes twice the time, and its gradient too.
"""

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


@jax.custom_vjp
def logits(x: jax.Array, gate: Gate) -> jax.Array:
    """x times a block-diagonal matrix, plus a bias.

    Args:
      x: [B, T, G * in], floating point.
      gate: of G blocks.

    Returns:
      [B, T, G * out] in x's dtype; products are accumulated in float32.
    """
    y = _multiply(x, gate.kernel.astype(x.dtype))
    bias = gate.bias.astype(jnp.float32).reshape(1, 1, -1)
    return (y + bias).astype(x.dtype)


def _forward(x, gate):
    return logits(x, gate), (x, gate)


def _backward(residuals, upstream):
    x, gate = residuals
    of_x, of_gate = logits_gradients(x, gate, upstream)
    of_gate = (
        jnp.sum(gradient, axis=0).astype(parameter.dtype)
        for gradient, parameter in zip(of_gate, gate, strict=True)
    )
    return of_x.astype(x.dtype), Gate(*of_gate)


logits.defvjp(_forward, _backward)


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
    transposed = jnp.swapaxes(gate.kernel, 1, 2).astype(x.dtype)
    of_bias = jnp.sum(upstream.astype(jnp.float32), axis=1)
    return _multiply(upstream, transposed), Gate(
        _multiply_sequences(x, upstream, groups),
        of_bias.reshape(x.shape[0], groups, -1),
    )


def _multiply(x, kernel):
    """[B, T, G * in] times [G, in, out], float32 [B, T, G * out]."""
    batch, length, _ = x.shape
    blocks = jnp.swapaxes(x.reshape(batch * length, kernel.shape[0], -1), 0, 1)
    y = einsum_float32("gni,gio->gno", blocks, kernel)
    return jnp.swapaxes(y, 0, 1).reshape(batch, length, -1)


def _multiply_sequences(x, upstream, groups):
    """Of each row and block, the sum over time of outer products: [B, G, in, out]."""
    x, upstream = (
        jnp.swapaxes(array.reshape(*x.shape[:2], groups, -1), 1, 2)
        for array in (x, upstream)
    )
    return einsum_float32("bgti,bgto->bgio", x, upstream)
