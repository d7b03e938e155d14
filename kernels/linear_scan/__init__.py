"""Linear scan: h_t = a_t * h_{t-1} + x_t, elementwise, along the time axis.

The gradient of a linear scan is a linear scan in the other direction, so one custom
derivative, written here, serves every implementation; a kernel may bring its own.
"""

from functools import partial

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import (
    Kernel,
    Table,
    dispatch,
    imported_late,
    takes,
)
from recurrentgemma.kernels.linear_scan import (
    associative,
    chunked,
    reference,
    sequential,
)

TPU_DTYPES = takes(jnp.float32, jnp.bfloat16)
GPU_DTYPES = takes(jnp.float32, jnp.bfloat16, jnp.float16)
PALLAS_TPU, PALLAS_GPU = f"{__name__}.pallas_tpu", f"{__name__}.pallas_gpu"
IMPLEMENTATIONS: Table = {
    "reference": reference.scan,
    "associative": associative.scan,
    "chunked": chunked.scan,
    "sequential": sequential.scan,
    "pallas_tpu": Kernel(
        imported_late(PALLAS_TPU, "scan"),
        "tpu",
        "btc,btc,bc->btc,bc",
        TPU_DTYPES,
    ),
    "pallas_gpu": Kernel(
        imported_late(PALLAS_GPU, "scan"), "cuda", "btc,btc,bc->btc,bc", GPU_DTYPES
    ),
}
PLATFORM_DEFAULTS = {
    "cpu": ("sequential",),
    "tpu": ("pallas_tpu", "associative"),
    "default": ("chunked",),
}


def linear_scan(
    x: jax.Array,
    a: jax.Array,
    h0: jax.Array | None = None,
    *,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes y_t = a_t * y_{t-1} + x_t with y_{-1} = h0.

    The carry is float32 whatever the inputs are. Decays may be of any size and sign.
    Differentiable in x, a and h0, through both results; each gradient has the dtype of
    its input.

    Args:
      x: inputs [B, T, D], floating point, any T >= 1 and any D.
      a: decays [B, T, D], floating point; may differ from x in dtype (decays near 1
        need float32).
      h0: state before the first step [B, D], float32; None is zero.
      reverse: run from the last step to the first; h0 then enters at step T - 1 and
        h_last is the state at step 0.
      implementation: a name of `IMPLEMENTATIONS`; None picks by platform.

    Returns:
      y: every state [B, T, D], in x's dtype.
      h_last: the state after the last step taken [B, D], float32.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: there is no such implementation.
    """
    _validate(x, a, h0)
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
    if x.shape[1] == 1 and implementation is None:
        h = a[:, 0].astype(jnp.float32) * h0 + x[:, 0].astype(jnp.float32)
        return h.astype(x.dtype)[:, None], h
    return _scan(x, a, h0, reverse, implementation)


def _run(x, a, h0, reverse, implementation) -> tuple[jax.Array, jax.Array]:
    return dispatch(
        "linear_scan",
        IMPLEMENTATIONS,
        PLATFORM_DEFAULTS,
        implementation,
        x,
        a,
        h0,
        reverse=reverse,
    )


_scan = jax.custom_vjp(_run, nondiff_argnums=(3, 4))


def _scan_forward(x, a, h0, reverse, implementation):
    y, h_last = _scan(x, a, h0, reverse, implementation)
    return (y, h_last), (a, h0, y)


def _scan_backward(reverse, implementation, residuals, cotangents):
    a, h0, y = residuals
    run = partial(_gradients, reverse=True) if reverse else linear_scan_gradients
    return run(a, h0, y, *cotangents, implementation=implementation)


def linear_scan_gradients(
    a: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, a and h0 of a scan that runs forward, for ops composed of it.

    Args:
      a, h0: arguments of the scan.
      y: its result.
      y_gradient: gradient of y [B, T, D], in y's dtype.
      last_gradient: gradient of h_last [B, D], float32.
      implementation: a name of `GRADIENTS`; None picks by platform.
    """
    return dispatch(
        "linear_scan's gradient",
        GRADIENTS,
        PLATFORM_DEFAULTS,
        implementation,
        a,
        h0,
        y,
        y_gradient,
        last_gradient,
    )


def _gradients(a, h0, y, y_cotangent, last_cotangent, *, reverse, implementation):
    """By a scan in the other direction."""
    # grad_x_t = y_cotangent_t + a_{t+1} * grad_x_{t+1}: the gradient of h_last enters
    # after the last step, undecayed.
    grad_x, grad_first = _scan(
        y_cotangent,
        _shift(a, jnp.ones_like(a[:, 0]), not reverse),
        last_cotangent,
        not reverse,
        implementation,
    )
    previous = _shift(y, h0.astype(y.dtype), reverse)
    grad_a = grad_x.astype(jnp.float32) * previous.astype(jnp.float32)
    first = -1 if reverse else 0
    grad_h0 = a[:, first].astype(jnp.float32) * grad_first
    return grad_x, grad_a.astype(a.dtype), grad_h0


_scan.defvjp(_scan_forward, _scan_backward)

GRADIENTS: Table = {
    **{
        name: partial(_gradients, reverse=False, implementation=name)
        for name in IMPLEMENTATIONS
    },
    "pallas_tpu": Kernel(
        imported_late(PALLAS_TPU, "gradients"),
        "tpu",
        "btc,bc,btc,btc,bc->btc,btc,bc",
        TPU_DTYPES,
    ),
    "pallas_gpu": Kernel(
        imported_late(PALLAS_GPU, "gradients"),
        "cuda",
        "btc,bc,btc,btc,bc->btc,btc,bc",
        GPU_DTYPES,
    ),
}
"""Of a scan that runs forward. Another scan, the other way, serves where no kernel is."""


def _shift(values, edge, towards_start):
    """Moves values one step along time; `edge` enters at the free end."""
    if towards_start:
        return jnp.concatenate([values[:, 1:], edge[:, None]], axis=1)
    return jnp.concatenate([edge[:, None], values[:, :-1]], axis=1)


def _validate(x, a, h0):
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(
            f"x must have shape [B, T, D] with T >= 1; got {x.shape}. "
            "Add the missing axis, or skip the call for an empty chunk."
        )
    if a.shape != x.shape:
        raise ValueError(f"a must have the shape of x, {x.shape}; got {a.shape}.")
    for name, array in (("x", x), ("a", a)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point; got {array.dtype}.")
    expected = (x.shape[0], x.shape[2])
    if h0 is not None and (h0.shape != expected or h0.dtype != jnp.float32):
        raise ValueError(
            f"h0 must be float32 {expected} (the state is kept in float32); "
            f"got {h0.dtype} {h0.shape}."
        )
