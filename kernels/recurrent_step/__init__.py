"""One token of a recurrent block: convolution, gates and RG-LRU as one op.

The step of decoding moves the gates' matrices and little else; as one piece of work its
state is read and written once, in place.
"""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.checks import check_array, check_arrays, check_kind
from recurrentgemma.kernels.dispatch import (
    EVERYWHERE,
    Implementation,
    Op,
    call,
    imported_late,
)
from recurrentgemma.kernels.recurrent_step import reference
from recurrentgemma.kernels.recurrent_step.reference import StepParameters
from recurrentgemma.kernels.rg_lru.gates import Gate, expected_gates

__all__ = ["Gate", "StepParameters", "recurrent_step"]


def recurrent_step(
    x: jax.Array,
    parameters: StepParameters,
    positions: jax.Array,
    h: jax.Array,
    conv_state: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Causal convolution and real-gated linear recurrent unit of one token a row.

    The same numbers as a causal convolution, block-diagonal gates and `rg_lru` of a
    sequence, one call for each of its steps. Differentiable in every floating-point
    argument, through all results. A caller that donates h and conv_state has them
    updated in place where the platform can.

    Args:
      x: the input of the convolution [B, E], floating point.
      parameters: see `StepParameters`; matrices are multiplied in x's dtype.
      positions: int32 [B], of the token in its document. At 0 a document starts: both
        states before it are forgotten. At a negative position they are held (padding)
        and y is finite.
      h: state of the RG-LRU [B, E], float32.
      conv_state: the last inputs of the convolution, oldest first, zero before the
        document's start [B, taps - 1, E], x's dtype.
      implementation: name of `IMPLEMENTATIONS`; None is the best for the platform.

    Returns:
      y: [B, E] in x's dtype.
      h: the state after the token [B, E], float32.
      conv_state: likewise [B, taps - 1, E].

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: the named implementation does not exist or cannot run.

    Source: Griffin, arXiv 2402.19427, sections 2.3 and 2.4.
    """
    _validate(x, parameters, positions, h, conv_state)
    arguments = (x, parameters, positions, h, conv_state)
    return call(RECURRENT_STEP, implementation, *arguments)


PALLAS_TPU = f"{__name__}.pallas_tpu"
IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(
        imported_late(PALLAS_TPU, "step"),
        kernel_for="tpu",
        default_on=("tpu",),
        supports=imported_late(PALLAS_TPU, "supports"),
    ),
    "reference": Implementation(reference.step, default_on=EVERYWHERE),
}
RECURRENT_STEP = Op(
    "recurrent_step",
    "bc,tc,c,gio,go,gio,go,c,b,bc,bsc->bc,bc,bsc",
    IMPLEMENTATIONS,
)


def _validate(x, parameters, positions, h, conv_state):
    check_array("x", x)
    check_kind("parameters", parameters, StepParameters)
    check_array("parameters.conv_kernel", parameters.conv_kernel)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"x: expected shape [B, E], one token a row, got {x.shape}; "
            "use rg_lru for a sequence."
        )
    batch, width = x.shape
    gates = {
        f"parameters.{name}": getattr(parameters, name)
        for name in ("recurrence_gate", "input_gate")
    }
    taps, floating = (*parameters.conv_kernel.shape, 1)[0], jnp.floating
    expected = {
        "x": (x, x.shape, floating),
        "parameters.conv_kernel": (parameters.conv_kernel, (taps, width), floating),
        "parameters.conv_bias": (parameters.conv_bias, (width,), floating),
        "parameters.a_param": (parameters.a_param, (width,), floating),
        "positions": (positions, (batch,), jnp.integer),
        "h": (h, (batch, width), jnp.float32),
        "conv_state": (conv_state, (batch, taps - 1, width), x.dtype),
    }
    check_arrays(expected | expected_gates(gates, width))
