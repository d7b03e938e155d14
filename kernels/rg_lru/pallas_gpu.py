"""RG-LRU as Pallas kernels for GPU: gates, decay, input factor and scan in one pass.

Programs, layout and passes are those of the linear scan's kernels, whose inputs and
decays are here computed from the logits as they are loaded: in both passes, since
logits are smaller than what is made from them. Padding and document starts become data
of the scan: a held step has decay 1 and input 0, a start has decay 0 and input factor 1.

The gradient recomputes the gates from the arguments, takes the states from the result,
and runs in the other direction (`linear_scan/pallas_gpu.py` has the equations). That
of a_param gathers in the carry of a program.
"""

from functools import partial

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.linear_scan.pallas_gpu import (
    Before,
    PerChunk,
    PerStep,
    call,
    choose_schedule,
    first_state,
    for_each_step,
    load,
    load_before,
    scan_of,
    store_last,
    summaries,
)
from recurrentgemma.kernels.rg_lru.reference import DECAY_SCALE, SMALLEST_RADICAND

UNROLL, GRADIENT_UNROLL = 16, 8
"""Steps in flight together: fewer than the scan's, as each has more inputs."""
SERIES_BELOW = 1 / 16
"""Below this, 1 - exp(-w) is a series: the difference would lose digits."""
SERIES = (1.0, -1 / 2, 1 / 6, -1 / 24)
"""Of (1 - exp(-w)) / w. The next term, w^4 / 120, is at most 1.3e-7."""
MOST_NEGATIVE_LOGIT = -40.0
"""Logits below it count as it: a gate of 4e-18. Products of exponentials stay finite."""
SMALLEST_ROOT = 1e-30
"""Keeps the reciprocal of a square root finite."""


def _read(x, recurrence, input_, positions, a_param):
    """What the scan loads at a step, and its input and decay made of that."""
    log_decay = _log_decay(a_param[...])

    def scan_inputs(x_t, recurrence_t, input_t, position):
        _, i, a, u, inverse = _gates(recurrence_t, input_t, log_decay)
        factor = jnp.where(position == 0, 1.0, u * inverse)
        x_t = jnp.where(position < 0, 0.0, factor * i * x_t)
        return x_t, _scan_decay(a, position)

    sequences = [load(ref) for ref in (x, recurrence, input_)]
    return [*sequences, lambda row: positions[row]], scan_inputs


def _read_adjoint(dy, recurrence, positions, a_param):
    log_decay = _log_decay(a_param[...])

    def scan_inputs(dy_t, recurrence_t, position):
        r = 1.0 / _inverse_gate(recurrence_t)
        return dy_t, _scan_decay(jnp.exp(log_decay * r), position)

    sequences = [load(ref) for ref in (dy, recurrence)]
    return [*sequences, lambda row: positions[row]], scan_inputs


def _gradient_kernel(
    dy, x, recurrence, input_, positions, a_param, y, y_before, h0, d_last, products,
    ends, dx, d_recurrence, d_input, d_a_param, dh, *, schedule,
):  # fmt: skip
    log_decay = _log_decay(a_param[...])

    def step(carry, inputs):
        c, total = carry
        dy_t, x_t, recurrence_t, input_t, position, before = inputs
        r, i, a, u, inverse = _gates(recurrence_t, input_t, log_decay)
        g = dy_t + c
        factor = jnp.where(position == 0, 1.0, u * inverse)
        x_gradient = jnp.where(position < 0, 0.0, g * factor * i)
        # d sqrt(1 - a^2) / d log a = -a^2 / sqrt(1 - a^2), bounded.
        slope = a * jnp.minimum(inverse, SMALLEST_RADICAND**-0.5)
        # Where a document starts or the state is held, the gates do not matter.
        per_gate = jnp.where(position > 0, a * g * (before - i * x_t * slope) * r, 0.0)
        results = (
            x_gradient,
            per_gate * log_decay * (1.0 - r),
            x_gradient * x_t * (1.0 - i),
        )
        return (_scan_decay(a, position) * g, total + per_gate), results

    loads = [load(ref) for ref in (dy, x, recurrence, input_)]
    loads += [
        lambda row: positions[row],
        load_before(y, y_before, h0),
    ]
    c = first_state(d_last, products, ends, schedule)
    c, total = for_each_step(
        step,
        (c, jnp.zeros_like(c)),
        loads,
        [dx, d_recurrence, d_input],
        schedule,
    )
    slope = -DECAY_SCALE * jax.nn.sigmoid(a_param[...].astype(jnp.float32))
    d_a_param[...] = slope * total
    store_last(dh, c, schedule)


def _gates(recurrence_logits, input_logits, log_decay):
    """r_t, i_t, a_t, 1 - a_t^2 and the inverse of its root; log_decay is log a / r."""
    one_over_r, one_over_i = map(_inverse_gate, (recurrence_logits, input_logits))
    # One reciprocal serves both gates.
    inverse = 1.0 / (one_over_r * one_over_i)
    r, i = inverse * one_over_i, inverse * one_over_r
    log_a = log_decay * r
    a = jnp.exp(log_a)
    w = -2.0 * log_a
    series = SERIES[-1]
    for coefficient in reversed(SERIES[:-1]):
        series = series * w + coefficient
    u = jnp.where(w < SERIES_BELOW, w * series, 1.0 - a * a)
    return r, i, a, u, jax.lax.rsqrt(jnp.maximum(u, SMALLEST_ROOT))


def _inverse_gate(logits):
    return 1.0 + jnp.exp(-jnp.maximum(logits, MOST_NEGATIVE_LOGIT))


def _log_decay(a_param):
    """log a_t / r_t = -8 softplus(a_param)."""
    a_param = a_param.astype(jnp.float32)
    return -DECAY_SCALE * (
        jnp.maximum(a_param, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(a_param)))
    )


def _scan_decay(a, position):
    return jnp.where(position == 0, 0.0, jnp.where(position < 0, 1.0, a))


@partial(jax.jit, static_argnames="interpret")
def recurrence(
    x: jax.Array,
    recurrence_logits: jax.Array,
    input_logits: jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `rg_lru`; a_param is [B, E] here, one for each row."""
    schedule = choose_schedule(x.shape, UNROLL, False, interpret)
    position = PerStep(positions)
    arrays = (x, recurrence_logits, input_logits, position, a_param)
    return scan_of("rg_lru", _read, arrays, h0, schedule)


@partial(jax.jit, static_argnames="interpret")
def gradients(
    x: jax.Array,
    recurrence_logits: jax.Array,
    input_logits: jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """See `composed.gradients`."""
    schedule = choose_schedule(x.shape, GRADIENT_UNROLL, True, interpret)
    position = PerStep(positions)
    adjoint = (y_gradient, recurrence_logits, position, a_param)
    sequences = (x, recurrence_logits, input_logits)
    batch, _, width = x.shape
    per_chunk = jax.ShapeDtypeStruct((batch, schedule.chunks, width), jnp.float32)
    *results, d_a_param, dh = call(
        partial(_gradient_kernel, schedule=schedule),
        "rg_lru_gradient",
        (
            *(y_gradient, *sequences, position, a_param, y, Before(y)),
            *(h0, last_gradient),
            *summaries("rg_lru_adjoint", _read_adjoint, adjoint, schedule, True),
        ),
        (*sequences, PerChunk(per_chunk), h0),
        schedule,
    )
    return *results, d_a_param.sum(1).astype(a_param.dtype), dh
