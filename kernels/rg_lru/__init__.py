"""RG-LRU: gates, decay, normalised input and linear scan as one op."""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import Kernel, Table, dispatch, imported_late
from recurrentgemma.kernels.linear_scan import GPU_DTYPES, TPU_DTYPES
from recurrentgemma.kernels.rg_lru import composed, reference

PALLAS_TPU, PALLAS_GPU = f"{__name__}.pallas_tpu", f"{__name__}.pallas_gpu"
IMPLEMENTATIONS: Table = {
    "reference": reference.recurrence,
    "composed": composed.recurrence,
    "pallas_tpu": Kernel(
        imported_late(PALLAS_TPU, "recurrence"),
        "tpu",
        "btc,btc,btc,bc,bt,bc->btc,bc",
        TPU_DTYPES,
    ),
    "pallas_gpu": Kernel(
        imported_late(PALLAS_GPU, "recurrence"),
        "cuda",
        "btc,btc,btc,bc,bt,bc->btc,bc",
        GPU_DTYPES,
    ),
}
PLATFORM_DEFAULTS = {"tpu": ("pallas_tpu", "composed"), "default": ("composed",)}


def rg_lru(
    x: jax.Array,
    recurrence_logits: jax.Array,
    input_logits: jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Real-gated linear recurrent unit after its gates' matrix products.

    With r = sigmoid(recurrence_logits), i = sigmoid(input_logits) and
    a_t = exp(-8 softplus(a_param) r_t):  y_t = a_t y_{t-1} + sqrt(1 - a_t^2) i_t x_t.
    Arithmetic and carry are float32. The derivative of the square root is bounded by
    1000. Differentiable in every floating-point argument, through both results.

    Args:
      x: inputs [B, T, E], floating point.
      recurrence_logits: the recurrence gate before its sigmoid [B, T, E].
      input_logits: the input gate before its sigmoid [B, T, E].
      a_param: Lambda of the paper [E], float32.
      positions: int32 [B, T]. At 0 a document starts: the state before it is forgotten
        and the input enters with factor 1. At a negative position the state is held
        (padding) and y is finite.
      h0: state before the first step [B, E], float32; None is zero.
      implementation: a name of `IMPLEMENTATIONS`; None picks by platform.

    Returns:
      y: [B, T, E] in x's dtype.
      h_last: the state after the last step [B, E], float32.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: there is no such implementation.

    Source: Griffin, arXiv 2402.19427, section 2.4; RecurrentGemma, arXiv 2404.07839.
    """
    validate(x, recurrence_logits, input_logits, a_param, positions, h0)
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
    if x.shape[1] == 1 and implementation is None:
        implementation = "composed"  # One step is elementwise: nothing to scan.
    # With a row of its own for each sequence, rows depend on each other nowhere.
    a_param = jnp.broadcast_to(a_param[None], h0.shape)
    return _recurrence(
        x, recurrence_logits, input_logits, a_param, positions, h0, implementation
    )


def rg_lru_forward(
    *arrays: jax.Array, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """`rg_lru` of its arguments in their order, a_param as [B, E], one for each row.

    Not differentiable: for ops that bring their own gradient.
    """
    return dispatch(
        "rg_lru", IMPLEMENTATIONS, PLATFORM_DEFAULTS, implementation, *arrays
    )


def _run(*arguments):
    return rg_lru_forward(*arguments[:-1], implementation=arguments[-1])


def _forward(*arguments):
    y, h_last = _recurrence(*arguments)
    return (y, h_last), (*arguments[:-1], y)


def _backward(implementation, residuals, cotangents):
    gradients = rg_lru_gradients(*residuals, *cotangents, implementation=implementation)
    *gradients, h0_gradient = gradients
    return *gradients, None, h0_gradient


def rg_lru_gradients(
    *arrays: jax.Array, implementation: str | None = None
) -> tuple[jax.Array, ...]:
    """Gradients of x, both logits, a_param and h0.

    Args:
      *arrays: the arguments of `rg_lru` with a_param as [B, E], one for each row; the
        result y; the gradients of y and of h_last.
      implementation: a name of `GRADIENTS`; None picks by platform.
    """
    return dispatch(
        "rg_lru's gradient", GRADIENTS, PLATFORM_DEFAULTS, implementation, *arrays
    )


_recurrence = jax.custom_vjp(_run, nondiff_argnums=(6,))
_recurrence.defvjp(_forward, _backward)


def _reference_gradients(*arrays):
    """By automatic differentiation, everything computed again."""
    x, recurrence_logits, input_logits, a_param, positions, h0, _, *cotangents = arrays

    def run(x, recurrence_logits, input_logits, a_param, h0):
        return reference.recurrence(
            x, recurrence_logits, input_logits, a_param, positions, h0
        )

    _, pull_back = jax.vjp(run, x, recurrence_logits, input_logits, a_param, h0)
    return pull_back(tuple(cotangents))


GRADIENTS: Table = {
    "reference": _reference_gradients,
    "composed": composed.gradients,
    "pallas_tpu": Kernel(
        imported_late(PALLAS_TPU, "gradients"),
        "tpu",
        "btc,btc,btc,bc,bt,bc,btc,btc,bc->btc,btc,btc,bc,bc",
        TPU_DTYPES,
    ),
    "pallas_gpu": Kernel(
        imported_late(PALLAS_GPU, "gradients"),
        "cuda",
        "btc,btc,btc,bc,bt,bc,btc,btc,bc->btc,btc,btc,bc,bc",
        GPU_DTYPES,
    ),
}
"""Take the arguments, y, and the gradients of y and h_last; a_param is [B, E]."""


def validate(x, recurrence_logits, input_logits, a_param, positions, h0) -> None:
    """Raises a ValueError if the arguments of `rg_lru` do not fit."""
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(
            f"x must have shape [B, T, E] with T >= 1; got {x.shape}. "
            "Add the missing axis, or skip the call for an empty chunk."
        )
    batch, length, width = x.shape
    expected = {
        "recurrence_logits": (recurrence_logits, x.shape),
        "input_logits": (input_logits, x.shape),
        "a_param": (a_param, (width,)),
        "positions": (positions, (batch, length)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} beside x {x.shape}; got {array.shape}."
            )
        kind = jnp.integer if name == "positions" else jnp.floating
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name} must be {kind.__name__}; got {array.dtype}.")
    if h0 is not None and (h0.shape != (batch, width) or h0.dtype != jnp.float32):
        raise ValueError(
            f"h0 must be float32 {(batch, width)} (the state is kept in float32); "
            f"got {h0.dtype} {h0.shape}."
        )
