"""RG-LRU from the parameters of its gates: their products and `rg_lru` as one op.

The gradient recomputes the products, so that nothing but the arguments and the result is
kept for it.
"""

from functools import partial

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import Kernel, Table, dispatch, imported_late
from recurrentgemma.kernels.linear_scan import TPU_DTYPES
from recurrentgemma.kernels.linear_scan.block_sizes import LANES, gate_block_sizes
from recurrentgemma.kernels.precision import custom_vjp
from recurrentgemma.kernels.rg_lru import IMPLEMENTATIONS as WITHOUT_GATES
from recurrentgemma.kernels.rg_lru import (
    rg_lru_forward,
    rg_lru_gradients,
    validate,
)
from recurrentgemma.kernels.rg_lru.gates import Gate, logits, logits_gradients

PALLAS_TPU = "recurrentgemma.kernels.rg_lru.with_gates_pallas_tpu"
PLATFORM_DEFAULTS = {"tpu": ("pallas_tpu", "apart"), "default": ("composed",)}


def rg_lru_with_gates(
    x: jax.Array,
    recurrence_gate: Gate,
    input_gate: Gate,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Real-gated linear recurrent unit, with its gates' block-diagonal products.

    `rg_lru` with `gates.logits(x, gate)` of both gates. Differentiable in every
    floating-point argument, through both results.

    Args:
      x: inputs [B, T, E], floating point.
      recurrence_gate, input_gate: kernels [G, E / G, E / G] and biases [G, E / G] of
        the gates; multiplied in x's dtype, accumulated in float32.
      a_param, positions, h0: as of `rg_lru`.
      implementation: a name of `IMPLEMENTATIONS`; None picks by platform.

    Returns:
      y: [B, T, E] in x's dtype.
      h_last: the state after the last step [B, E], float32.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: there is no such implementation, or it does not take these
        arguments.

    Source: Griffin, arXiv 2402.19427, section 2.4; RecurrentGemma, arXiv 2404.07839.
    """
    _validate(x, recurrence_gate, input_gate, a_param, positions, h0)
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
    if implementation is None and (x.shape[1] == 1 or _supports(x, input_gate.kernel)):
        # One step has nothing to scan; or the only kernel with products does not fit.
        implementation = "apart"
    # With a row of its own for each sequence, rows depend on each other nowhere.
    a_param = jnp.broadcast_to(a_param[None], h0.shape)
    gates = (*recurrence_gate, *input_gate)
    return _recurrence(x, *gates, a_param, positions, h0, implementation)


def _run(*arguments) -> tuple[jax.Array, jax.Array]:
    *arrays, implementation = arguments
    return dispatch(
        "rg_lru_with_gates", IMPLEMENTATIONS, PLATFORM_DEFAULTS, implementation, *arrays
    )


def _forward(*arguments):
    y, h_last = _run(*arguments)
    return (y, h_last), (*arguments[:-1], y)


def _backward(implementation, residuals, cotangents):
    x_gradient, *of_gates, a_param_gradient, h0_gradient = rg_lru_with_gates_gradients(
        *residuals, *cotangents, implementation=implementation
    )
    of_gates = [
        jnp.sum(gradient, axis=0).astype(parameter.dtype)
        for gradient, parameter in zip(of_gates, residuals[1:5], strict=True)
    ]
    return x_gradient, *of_gates, a_param_gradient, None, h0_gradient


def rg_lru_with_gates_gradients(
    *arrays: jax.Array, implementation: str | None = None
) -> tuple[jax.Array, ...]:
    """Gradients of x; of kernel and bias of both gates, for each row; of a_param, h0.

    Args:
      *arrays: x, kernel and bias of both gates, a_param as [B, E], one for each row,
        positions and h0; the result y; the gradients of y and of h_last.
      implementation: a name of `GRADIENTS`; None picks by platform.
    """
    return dispatch(
        "rg_lru_with_gates's gradient",
        GRADIENTS,
        PLATFORM_DEFAULTS,
        implementation,
        *arrays,
    )


_recurrence = custom_vjp(_run, _forward, _backward, static=(8,))


def apart(
    x, r_kernel, r_bias, i_kernel, i_bias, a_param, positions, h0, *, implementation
):
    """The products, then an implementation of `rg_lru`."""
    of_gates = logits(x, Gate(r_kernel, r_bias)), logits(x, Gate(i_kernel, i_bias))
    arrays = (x, *of_gates, a_param, positions, h0)
    return rg_lru_forward(*arrays, implementation=implementation)


def _gradients_apart(x, r_kernel, r_bias, i_kernel, i_bias, *arrays, implementation):
    gates = Gate(r_kernel, r_bias), Gate(i_kernel, i_bias)
    of_gates = (logits(x, gate) for gate in gates)
    x_gradient, *upstream, a_param_gradient, h0_gradient = rg_lru_gradients(
        x, *of_gates, *arrays, implementation=implementation
    )
    x_gradient = x_gradient.astype(jnp.float32)
    of_parameters = []
    for gate, gradient in zip(gates, upstream, strict=True):
        through_gate, of_gate = logits_gradients(x, gate, gradient)
        x_gradient += through_gate
        of_parameters += of_gate
    return x_gradient.astype(x.dtype), *of_parameters, a_param_gradient, h0_gradient


def _supports(x, r_kernel, *arrays, **options):
    """Why the kernels for TPU cannot take these arguments, or None."""
    del arrays, options
    width = r_kernel.shape[1]
    if width % LANES:
        return f"blocks of the gates must be multiples of {LANES} wide, not {width}"
    if gate_block_sizes(x.shape, width, x.dtype.itemsize, gradient=True) is None:
        return f"a gate block of {width} channels does not fit in on-chip memory"
    return TPU_DTYPES(x)


INPUTS = "btc,gio,go,gio,go,bc,bt,bc"
IMPLEMENTATIONS: Table = {
    **{name: partial(apart, implementation=name) for name in WITHOUT_GATES},
    "apart": partial(apart, implementation=None),
    "pallas_tpu": Kernel(
        imported_late(PALLAS_TPU, "recurrence"), "tpu", f"{INPUTS}->btc,bc", _supports
    ),
}
"""By the name of an implementation of `rg_lru`, it after the products; "apart" is the
platform's. For TPU there is a kernel with the products inside."""
GRADIENTS: Table = {
    **{name: partial(_gradients_apart, implementation=name) for name in WITHOUT_GATES},
    "apart": partial(_gradients_apart, implementation=None),
    "pallas_tpu": Kernel(
        imported_late(PALLAS_TPU, "gradients"),
        "tpu",
        f"{INPUTS},btc,btc,bc->btc,bgio,bgo,bgio,bgo,bc,bc",
        _supports,
    ),
}
"""Take the arguments, y, and the gradients of y and h_last; a_param is [B, E]. Gradients
of the gates' parameters are those of each row, float32."""


def _validate(x, recurrence_gate, input_gate, a_param, positions, h0):
    validate(x, x, x, a_param, positions, h0)
    width = x.shape[2]
    for name, gate in (
        ("recurrence_gate", recurrence_gate),
        ("input_gate", input_gate),
    ):
        groups = gate.bias.shape[0]
        block = width // groups
        expected = (groups, block, block), (groups, block)
        if (gate.kernel.shape, gate.bias.shape) != expected or width % groups:
            raise ValueError(
                f"{name} must have a kernel [G, E / G, E / G] and a bias [G, E / G] "
                f"with E = {width}; got {gate.kernel.shape} and {gate.bias.shape}."
            )
        for array in gate:
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(f"{name} must be floating; got {array.dtype}.")
    if recurrence_gate.kernel.shape != input_gate.kernel.shape:
        raise ValueError(
            "Both gates must have as many blocks; got kernels "
            f"{recurrence_gate.kernel.shape} and {input_gate.kernel.shape}."
        )
