"""The complex linear scan and the complex RG-LRU (CG-LRU), on real arrays.

Complex numbers lie as in the checkpoints: the first half of the channels holds the real
parts, the second half the imaginary ones.

In a frame that turns with the decays a complex scan is a real one. With a_t = r_t
exp(i p_t), P_t = p_0 + ... + p_t and h'_t = h_t exp(-i P_t),

    h_t = a_t h_{t-1} + x_t        becomes        h'_t = r_t h'_{t-1} + x_t exp(-i P_t)

so that every implementation of `linear_scan` serves, and padding, carried states and
the derivative are as there. P_t is summed in fixed point, which wraps after a whole
turn: no digit is lost over any number of steps.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.checks import check_array, check_arrays, check_switch
from recurrentgemma.kernels.dispatch import EVERYWHERE, Implementation, Op, call
from recurrentgemma.kernels.linear_scan import LINEAR_SCAN, linear_scan, other_way
from recurrentgemma.kernels.rg_lru.reference import (
    gate_values,
    input_factor,
    scan_decay,
)

_UNITS_PER_RADIAN = 2**32 / (2 * math.pi)


def complex_rg_lru(
    x: jax.Array,
    recurrence_logits: jax.Array,
    input_logits: jax.Array,
    a_param: jax.Array,
    a_imag_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`rg_lru` on complex numbers; the gates are real.

    With r and i as there and
    a_t = exp((-8 softplus(a_param) + 1j * a_imag_param) r_t):
    y_t = a_t y_{t-1} + sqrt(1 - |a_t|^2) i_t x_t.

    Args:
      x: inputs [B, T, E], floating point: E / 2 real parts, then E / 2 imaginary ones.
      recurrence_logits: the recurrence gate before its sigmoid [B, T, E / 2].
      input_logits: the input gate before its sigmoid [B, T, E / 2].
      a_param: Lambda of the paper [E / 2], float32.
      a_imag_param: the phase of the decay at an open gate, in radians [E / 2], float32.
      positions: int32 [B, T]; 0 starts a document, a negative one holds the state.
      h0: state before the first step [B, E], float32; None is zero.
      implementation: name of `linear_scan.IMPLEMENTATIONS`; None is the best.

    Returns:
      y: [B, T, E] in x's dtype.
      h_last: the state after the last step [B, E], float32.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: the named implementation does not exist or cannot run.

    Source: Griffin, arXiv 2402.19427, appendix B.
    """
    _check_width(x)
    half = (*x.shape[:2], x.shape[2] // 2)
    check_arrays(
        {
            "recurrence_logits": (recurrence_logits, half, jnp.floating),
            "input_logits": (input_logits, half, jnp.floating),
            "a_param": (a_param, half[2:], jnp.floating),
            "a_imag_param": (a_imag_param, half[2:], jnp.floating),
            "positions": (positions, half[:2], jnp.integer),
        }
    )
    r, i, _, radius, u = gate_values(recurrence_logits, input_logits, a_param)
    position = positions[..., None]
    radius = scan_decay(radius, position)
    phase = a_imag_param.astype(jnp.float32)[None, None] * r
    phase = jnp.where(position < 0, 0.0, phase)
    factor = jnp.where(position < 0, 0.0, input_factor(u, position)) * i
    y, h_last = complex_linear_scan(
        _join(factor, factor) * x.astype(jnp.float32),
        _join(radius * jnp.cos(phase), radius * jnp.sin(phase)),
        h0,
        implementation=implementation,
    )
    return y.astype(x.dtype), h_last


def complex_linear_scan(
    x: jax.Array,
    a: jax.Array,
    h0: jax.Array | None = None,
    *,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`linear_scan` on complex numbers: D / 2 real parts, then D / 2 imaginary ones.

    Args, Returns and Raises are those of `linear_scan`; an odd D is a ValueError too.
    """
    _check_width(x)
    check_switch("reverse", reverse)
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
    check_arrays(
        {
            "a": (a, x.shape, jnp.floating),
            "h0": (h0, (x.shape[0], x.shape[2]), jnp.float32),
        }
    )
    return call(COMPLEX_SCAN, None, x, a, h0, reverse=reverse, scan=implementation)


def _in_turning_frame(x, a, h0, *, reverse, scan) -> tuple[jax.Array, jax.Array]:
    real, imaginary = jnp.split(a.astype(jnp.float32), 2, axis=-1)
    radius = jnp.hypot(real, imaginary)
    # Rounded to pairs of units, because half a turn of single ones overflows an int32.
    pairs = jnp.round(jnp.arctan2(imaginary, real) * (_UNITS_PER_RADIAN / 2))
    total = jax.lax.cumsum(2 * pairs.astype(jnp.int32), axis=1, reverse=reverse)
    angle = total.astype(jnp.float32) / _UNITS_PER_RADIAN
    turn = _join(jnp.cos(angle), jnp.sin(angle))
    y, h_last = linear_scan(
        _multiply(_conjugate(turn), x.astype(jnp.float32)),
        _join(radius, radius),
        h0,
        reverse=reverse,
        implementation=scan,
    )
    last_turn = turn[:, 0 if reverse else -1]
    return _multiply(turn, y).astype(x.dtype), _multiply(last_turn, h_last)


def _gradients(arguments, results, upstream, *, reverse, scan):
    """As the real one's, with conjugates: the gradient of a product u v is conj(u)."""
    (_, a, h0), (y, _) = arguments, results
    half = a.shape[2] // 2
    return other_way(
        partial(complex_linear_scan, implementation=scan),
        (None, _conjugate(a), _conjugate(h0)),
        (_conjugate(y), None),
        upstream,
        reverse=reverse,
        multiply=_multiply,
        one=(jnp.arange(2 * half) < half)[None],
    )


COMPLEX_SCAN = Op(
    "complex_linear_scan",
    LINEAR_SCAN.dims,
    {"turning": Implementation(_in_turning_frame, _gradients, default_on=EVERYWHERE)},
    keep=LINEAR_SCAN.keep,
)


def _check_width(x):
    check_array("x", x)
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] % 2:
        raise ValueError(
            "x: expected shape [B, T, E] with T >= 1 and an even E, got "
            f"{x.shape}; real parts come first, as many imaginary ones follow."
        )


def _join(real, imaginary):
    return jnp.concatenate([real, imaginary], axis=-1)


def _multiply(u, v):
    (a, b), (c, d) = jnp.split(u, 2, axis=-1), jnp.split(v, 2, axis=-1)
    return _join(a * c - b * d, a * d + b * c)


def _conjugate(z):
    real, imaginary = jnp.split(z, 2, axis=-1)
    return _join(real, -imaginary)
