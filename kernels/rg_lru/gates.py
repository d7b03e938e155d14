"""The gates of the RG-LRU before their sigmoids: block-diagonal matrix products.

Diagonal blocks are multiplied one after another, each on its own channels. As one batched
product, the compilers for CPU and TPU put time last and transpose every sequence before
and after it: on two CPU cores the RG-LRU with its gates then takes twice the time, and its
gradient more. For GPUs, which pay for every call of a product, it is one.
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

    def at_once(x, kernel):
        blocks = x.reshape(*x.shape[:2], kernel.shape[0], -1)
        y = einsum_float32("btgi,gio->btgo", blocks, kernel)
        return y.reshape(*x.shape[:2], -1)

    def one_by_one(x, kernel):
        blocks = jnp.split(x, kernel.shape[0], axis=-1)
        parts = [
            einsum_float32("bti,io->bto", block, kernel[g])
            for g, block in enumerate(blocks)
        ]
        return jnp.concatenate(parts, axis=-1)

    return _by_platform(at_once, one_by_one, x, kernel)


def _multiply_sequences(x, upstream, groups):
    """Of each row and block, the sum over time of outer products: [B, G, in, out]."""

    def at_once(x, upstream):
        x, upstream = (a.reshape(*a.shape[:2], groups, -1) for a in (x, upstream))
        return einsum_float32("btgi,btgo->bgio", x, upstream)

    def one_by_one(x, upstream):
        pairs = (jnp.split(array, groups, axis=-1) for array in (x, upstream))
        parts = [
            einsum_float32("bti,bto->bio", *pair) for pair in zip(*pairs, strict=True)
        ]
        return jnp.stack(parts, axis=1)

    return _by_platform(at_once, one_by_one, x, upstream)


def _by_platform(at_once, one_by_one, x, other):
    if x.shape[1] == 1:  # Nothing to transpose.
        return at_once(x, other)
    return jax.lax.platform_dependent(
        x, other, cuda=at_once, rocm=at_once, default=one_by_one
    )
