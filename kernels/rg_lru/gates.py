"""The gates of the RG-LRU before their sigmoids: block-diagonal matrix products.

Blocks come first while they are multiplied. Left to choose, the compiler for CPU puts time
last and transposes every sequence, element by element, before and after: on two cores the
RG-LRU with its gates then takes twice the time, and its gradient too. The one for TPU
copies sequences either way, which is what `with_gates_pallas_tpu.py` is for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.precision import custom_vjp, einsum_float32


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
    return _logits(x, gate)


def _run(x, gate):
    blocks, kernel = _to_blocks(x, len(gate.kernel)), gate.kernel.astype(x.dtype)
    y = einsum_float32("gni,gio->gno", blocks, kernel)
    y = y + gate.bias.astype(jnp.float32)[:, None]
    return _to_sequence(y.astype(x.dtype), x.shape)


def _forward(x, gate):
    return _run(x, gate), (x, gate)


def _backward(residuals, upstream):
    x, gate = residuals
    of_x, of_gate = logits_gradients(x, gate, upstream)
    of_gate = (
        jnp.sum(gradient, axis=0).astype(parameter.dtype)
        for gradient, parameter in zip(of_gate, gate, strict=True)
    )
    return of_x.astype(x.dtype), Gate(*of_gate)


_logits = custom_vjp(_run, _forward, _backward)


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
    groups = len(gate.kernel)
    kernel = gate.kernel.astype(x.dtype)
    of_x = einsum_float32("gno,gio->gni", _to_blocks(upstream, groups), kernel)
    of_bias = jnp.sum(upstream.astype(jnp.float32), axis=1)
    rows, upstream_rows = (
        jnp.swapaxes(array.reshape(*x.shape[:2], groups, -1), 1, 2)
        for array in (x, upstream)
    )
    return _to_sequence(of_x, x.shape), Gate(
        einsum_float32("bgti,bgto->bgio", rows, upstream_rows),
        of_bias.reshape(x.shape[0], groups, -1),
    )


def _to_blocks(x, groups):
    """[B, T, G * channels] -> [G, B * T, channels]."""
    return jnp.swapaxes(x.reshape(x.shape[0] * x.shape[1], groups, -1), 0, 1)


def _to_sequence(blocks, shape):
    """[G, B * T, channels] -> [B, T, G * channels]; shape starts with B and T."""
    return jnp.swapaxes(blocks, 0, 1).reshape(*shape[:2], -1)
