"""One token of a recurrent block: convolution, gates and RG-LRU as one op.

The step of decoding moves the gates' matrices and little else; as one piece of work its
state is read and written once, in place.
"""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import Kernel, Table, dispatch, imported_late
from recurrentgemma.kernels.recurrent_step import reference
from recurrentgemma.kernels.recurrent_step.reference import StepParameters
from recurrentgemma.kernels.rg_lru.gates import Gate

PALLAS_TPU = f"{__name__}.pallas_tpu"
IMPLEMENTATIONS: Table = {
    "reference": reference.step,
    "pallas_tpu": Kernel(
        imported_late(PALLAS_TPU, "step"),
        "tpu",
        "bc,bsc,b,bc,tc,c,gio,go,gio,go,c->bc,bc,bsc",
        imported_late(PALLAS_TPU, "supports"),
    ),
}
PLATFORM_DEFAULTS = {"tpu": ("pallas_tpu", "reference"), "default": ("reference",)}

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
      implementation: a name of `IMPLEMENTATIONS`; None picks by platform.

    Returns:
      y: [B, E] in x's dtype.
      h: the state after the token [B, E], float32.
      conv_state: likewise [B, taps - 1, E].

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: there is no such implementation, or it does not take these
        arguments.

    Source: Griffin, arXiv 2402.19427, sections 2.3 and 2.4.
    """
    _validate(x, parameters, positions, h, conv_state)
    return dispatch(
        "recurrent_step",
        IMPLEMENTATIONS,
        PLATFORM_DEFAULTS,
        implementation,
        x,
        conv_state,
        positions,
        h,
        *jax.tree.leaves(parameters),
    )


def _validate(x, parameters, positions, h, conv_state):
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"x must have shape [B, E], one token a row; got {x.shape}. "
            "Use rg_lru for a sequence."
        )
    batch, width = x.shape
    conv_kernel = parameters.conv_kernel
    blocks = parameters.recurrence_gate.kernel.shape[0]
    block = width // max(blocks, 1)
    floating = jnp.floating
    expected = {
        "conv_kernel": (conv_kernel, (*conv_kernel.shape[:1], width), floating),
        "conv_bias": (parameters.conv_bias, (width,), floating),
        "a_param": (parameters.a_param, (width,), floating),
        "positions": (positions, (batch,), jnp.integer),
        "h": (h, (batch, width), jnp.float32),
        "conv_state": (
            conv_state,
            (batch, conv_kernel.shape[0] - 1, width),
            x.dtype,
        ),
    }
    for name in ("recurrence_gate", "input_gate"):
        gate = getattr(parameters, name)
        expected[f"{name}.kernel"] = (gate.kernel, (blocks, block, block), floating)
        expected[f"{name}.bias"] = (gate.bias, (blocks, block), floating)
    for name, (array, shape, dtype) in {
        "x": (x, x.shape, floating),
        **expected,
    }.items():
        if array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} beside x {x.shape}; got {array.shape}."
            )
        if not jnp.issubdtype(array.dtype, dtype):
            kind = getattr(dtype, "__name__", dtype)
            raise ValueError(f"{name} must be {kind}; got {array.dtype}.")
