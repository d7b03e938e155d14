"""Linear scan: h_t = a_t * h_{t-1} + x_t, elementwise, along the time axis.

The gradient of a linear scan is a linear scan in the other direction: with g the
gradient of x and b that of h_last,

    g_t = dy_t + a_{t+1} g_{t+1}, from g_{T-1} = dy_{T-1} + b
    grad_a_t = g_t y_{t-1}           grad_h0 = a_0 g_0

so every entry but the reference brings one of its own kind.
"""

import operator
from functools import partial

import jax
import jax.numpy as jnp

from recurrentgemma.kernels import gpu, sharded
from recurrentgemma.kernels.checks import check_arrays, check_sequence, check_switch
from recurrentgemma.kernels.dispatch import (
    EVERYWHERE,
    Implementation,
    Op,
    call,
    gradient,
    imported_late,
    takes,
)
from recurrentgemma.kernels.linear_scan import (
    associative,
    chunked,
    reference,
    sequential,
)
from recurrentgemma.kernels.linear_scan.chunked import shifted

TPU_DTYPES = takes(jnp.float32, jnp.bfloat16)
GPU_DTYPES = takes(jnp.float32, jnp.bfloat16, jnp.float16)
PALLAS_TPU, PALLAS_GPU = f"{__name__}.pallas_tpu", f"{__name__}.pallas_gpu"
MOSAIC_GPU = f"{__name__}.mosaic_gpu"


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
      implementation: name of `IMPLEMENTATIONS`; None is the best for the platform.

    Returns:
      y: every state [B, T, D], in x's dtype.
      h_last: the state after the last step taken [B, D], float32.

    Raises:
      ValueError: shapes or dtypes do not fit, or reverse is no boolean.
      NotImplementedError: the named implementation does not exist or cannot run.
    """
    _validate(x, a, h0)
    check_switch("reverse", reverse)
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
    return call(LINEAR_SCAN, implementation, x, a, h0, reverse=reverse)


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
      implementation: as of `linear_scan`.
    """
    # The shape and dtype of x are those of y; its values enter no gradient.
    arguments, results, upstream = (y, a, h0), (y, None), (y_gradient, last_gradient)
    if implementation == "reference":
        scan = partial(linear_scan, implementation="reference")
        return other_way(scan, arguments, results, upstream, reverse=False)
    return gradient(
        LINEAR_SCAN, implementation, arguments, results, upstream, reverse=False
    )


def one_step(x, a, h0, reverse):
    """The scan of a single step."""
    del reverse
    h = a[:, 0].astype(jnp.float32) * h0 + x[:, 0].astype(jnp.float32)
    return h.astype(x.dtype)[:, None], h


def takes_one_step(*arguments, **options):
    """`Implementation.supports` of entries for T = 1; x comes first."""
    del options
    length = jax.tree.leaves(arguments)[0].shape[1]
    return None if length == 1 else f"it takes one step, not {length}"


def other_way(
    scan, arguments, results, upstream, *, reverse, multiply=operator.mul, one=1
):
    """An `Implementation.gradient` by a scan in the other direction.

    `scan` takes x, a, h0 and `reverse`; `one` is the neutral element of `multiply`.
    """
    (_, a, h0), (y, _) = arguments, results
    y_gradient, last_gradient = upstream
    # The gradient of h_last enters after the last step, undecayed.
    decays = shifted(a, jnp.full_like(a[:, 0], one), towards_start=not reverse)
    grad_x, grad_first = scan(y_gradient, decays, last_gradient, reverse=not reverse)
    previous = shifted(y, h0.astype(y.dtype), towards_start=reverse)
    grad_a = multiply(grad_x.astype(jnp.float32), previous.astype(jnp.float32))
    first = -1 if reverse else 0
    grad_h0 = multiply(a[:, first].astype(jnp.float32), grad_first)
    return grad_x, grad_a.astype(a.dtype), grad_h0


def _kernel_gradient(module, arguments, results, upstream, *, reverse, **interpret):
    if reverse:
        scan = partial(imported_late(module, "scan"), **interpret)
        return other_way(scan, arguments, results, upstream, reverse=True)
    _, *states = arguments
    kernel = imported_late(module, "gradients")
    return kernel(*states, results[0], *upstream, **interpret)


def _supports_mosaic(*arguments, **options):
    return GPU_DTYPES(*arguments, **options) or gpu.against_mosaic()


def _plain(name, scan, **fields):
    """An entry whose gradient is the same scan, differentiable again."""
    again = partial(linear_scan, implementation=name)
    return Implementation(scan, partial(other_way, again), **fields)


def _kernel(module, platform, supports, **fields):
    scan, gradients = imported_late(module, "scan"), partial(_kernel_gradient, module)
    return Implementation(
        scan, gradients, kernel_for=platform, supports=supports, **fields
    )


def _without_x(arguments, results):
    """What a gradient needs: not the inputs, which are as large as the result."""
    return (None, *arguments[1:]), (results[0], None)


IMPLEMENTATIONS = {
    "one_step": _plain(
        "one_step", one_step, default_on=EVERYWHERE, supports=takes_one_step
    ),
    "pallas_tpu": _kernel(PALLAS_TPU, "tpu", TPU_DTYPES, default_on=("tpu",)),
    "pallas_gpu": _kernel(PALLAS_GPU, "cuda", GPU_DTYPES, default_on=("cuda",)),
    "sequential": _plain("sequential", sequential.scan, default_on=("cpu",)),
    "associative": _plain("associative", associative.scan, default_on=("tpu",)),
    "chunked": _plain("chunked", chunked.scan, default_on=EVERYWHERE),
    "mosaic_gpu": _kernel(MOSAIC_GPU, "cuda", _supports_mosaic),
    "reference": Implementation(reference.scan),
}


def _sample(dtype):
    """Two chunks, of which the second ends in a part of a group."""
    wave = jnp.sin(jnp.arange(2 * 300 * 40, dtype=jnp.float32)).reshape(2, 300, 40)
    x, a, h0 = wave.astype(dtype), 0.9 + 0.1 * wave[:, ::-1], wave[:, 0]
    return (x, a, h0), {"reverse": False}


def _on_shards(scan, axis, x, a, h0, *, reverse):
    start = sharded.start_state(x, a, h0, axis, reverse=reverse)
    y, h = scan(x, a, start)
    return y, sharded.last_state(h, axis, reverse=reverse)


LINEAR_SCAN = Op(
    "linear_scan",
    "btc,btc,bc->btc,bc",
    IMPLEMENTATIONS,
    keep=_without_x,
    sample=_sample,
    on_shards=_on_shards,
)


def _validate(x, a, h0):
    check_sequence(x, "B, T, D")
    expected = {"x": (x, x.shape, jnp.floating), "a": (a, x.shape, jnp.floating)}
    if h0 is not None:
        expected["h0"] = (h0, (x.shape[0], x.shape[2]), jnp.float32)
    check_arrays(expected)
