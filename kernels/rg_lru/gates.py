"""The gates of the RG-LRU before their sigmoids: block-diagonal matrix products.

Blocks come first while they are multiplied. Left to choose, the compiler for CPU puts time
last and transposes every sequence, element by element, before and after: on two cores the
RG-LRU with its gates then takes twice the time, and its gradient too. The one for TPU
copies sequences either way, which is what `with_gates_pallas_tpu.py` is for.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.checks import check_array, check_kind
from recurrentgemma.kernels.precision import custom_vjp, einsum_float32


class Gate(NamedTuple):
    """Parameters of a gate: G diagonal blocks of a matrix of G * in x G * out."""

    kernel: jax.Array
    """[G, in, out], floating point; multiplied in the dtype of the inputs."""
    bias: jax.Array
    """[G, out], floating point."""


class Inputs(NamedTuple):
    """The arguments of `rg_lru`, or their gradients."""

    x: Any
    recurrence_gate: Any
    """A `Gate`, or logits like x; so is the input gate."""
    input_gate: Any
    a_param: Any
    positions: Any
    """None among gradients."""
    h0: Any


def expected_gates(gates: Mapping[str, Gate], width: int) -> dict[str, Any]:
    """What `check_arrays` expects of gates with as many blocks as the first of them."""
    expected, groups = {}, None
    for name, gate in gates.items():
        check_kind(name, gate, Gate)
        check_array(f"{name}.kernel", gate.kernel)
        if groups is None:
            groups = gate.kernel.shape[0] if gate.kernel.ndim else 0
        block = width / max(groups, 1)
        shape = (groups, block, block)
        expected[f"{name}.kernel"] = (gate.kernel, shape, jnp.floating)
        expected[f"{name}.bias"] = (gate.bias, shape[:2], jnp.floating)
    return expected


def product(x: jax.Array, gate: Gate | jax.Array) -> jax.Array:
    """The logits of a gate: x times a block-diagonal matrix, plus a bias.

    Args:
      x: [B, T, G * in], floating point.
      gate: parameters of G blocks; or the logits, which come back as they are.

    Returns:
      [B, T, G * out] in x's dtype; products are accumulated in float32.
    """
    if not isinstance(gate, Gate):
        return gate
    blocks, kernel = _to_blocks(x, len(gate.kernel)), gate.kernel.astype(x.dtype)
    y = einsum_float32("gni,gio->gno", blocks, kernel)
    y = y + gate.bias.astype(jnp.float32)[:, None]
    return _to_sequence(y.astype(x.dtype), x.shape)


def _forward(x, gate):
    return product(x, gate), (x, gate)


def _backward(residuals, upstream):
    x, gate = residuals
    if not isinstance(gate, Gate):
        return jnp.zeros_like(x), upstream
    of_x, of_gate = _product_gradients(x, gate, upstream)
    return of_x.astype(x.dtype), of_gate


logits = custom_vjp(product, _forward, _backward)
"""`product` whose gradient multiplies in x's dtype too."""


def from_logits(inputs: Inputs) -> Inputs:
    """The same inputs with the logits of both gates."""
    x, recurrence_gate, input_gate, *_ = inputs
    return inputs._replace(
        recurrence_gate=logits(x, recurrence_gate), input_gate=logits(x, input_gate)
    )


def with_products(gradients: Callable[..., tuple[Inputs]]) -> Callable[..., Any]:
    """Gradients of an op whose gates are `Gate`s, from those of the op from logits.

    Args:
      gradients: an `Implementation.gradient` of inputs with logits.
    """

    @functools.wraps(gradients)
    def of_gates(arguments, results, upstream, **options):
        (inputs,) = arguments
        (found,) = gradients((from_logits(inputs),), results, upstream, **options)
        if not isinstance(inputs.recurrence_gate, Gate):
            return (found,)
        of_x, of_gates = found.x.astype(jnp.float32), {}
        for name in ("recurrence_gate", "input_gate"):
            gate, of_logits = getattr(inputs, name), getattr(found, name)
            through_gate, of_gates[name] = _product_gradients(inputs.x, gate, of_logits)
            of_x += through_gate
        return (found._replace(x=of_x.astype(inputs.x.dtype), **of_gates),)

    return of_gates


def _product_gradients(x, gate, upstream):
    """Gradients of x [B, T, G * in], float32, and of the gate."""
    groups = len(gate.kernel)
    kernel = gate.kernel.astype(x.dtype)
    blocks, upstream_blocks = _to_blocks(x, groups), _to_blocks(upstream, groups)
    of_x = einsum_float32("gno,gio->gni", upstream_blocks, kernel)
    of_kernel = einsum_float32("gni,gno->gio", blocks, upstream_blocks)
    of_bias = jnp.sum(upstream.astype(jnp.float32), axis=(0, 1)).reshape(groups, -1)
    of_gate = Gate(of_kernel.astype(gate.kernel.dtype), of_bias.astype(gate.bias.dtype))
    return _to_sequence(of_x, x.shape), of_gate


def _to_blocks(x, groups):
    """[B, T, G * channels] -> [G, B * T, channels]."""
    return jnp.swapaxes(x.reshape(x.shape[0] * x.shape[1], groups, -1), 0, 1)


def _to_sequence(blocks, shape):
    """[G, B * T, channels] -> [B, T, G * channels]; shape starts with B and T."""
    return jnp.swapaxes(blocks, 0, 1).reshape(*shape[:2], -1)
