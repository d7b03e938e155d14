"""The linear scan in groups of steps, without a loop: for GPUs without a kernel.

A group of steps is affine in the state before it: from h it ends at end + product * h,
with `end` its end from zero and `product` that of its decays. All groups are summarised
side by side; the same scan over these summaries gives the state before each group; and
from these states all groups run side by side. 8192 steps are 512 groups, which are 32,
and 32 steps run one after another: a handful of launches in all.

The steps of a group are written out. x and a are read twice; the states are written for
each step of a group, and then in the order of time (`bench gpu_counts` counts the bytes).
A product has T / 32 decays at most: only decays that stay above 1 overflow it, as they do
the states.
"""

from functools import partial

import jax
import jax.numpy as jnp

GROUP = 16
"""Steps of a group. With 32, the RG-LRU's kernels spill registers on an H100; with 8,
summaries move twice the bytes."""
SHORTEST = 32
"""Number of steps, at most, that are not cut into groups."""


@partial(jax.jit, static_argnames="reverse")
def scan(
    x: jax.Array, a: jax.Array, h0: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""
    batch, length, width = x.shape
    if length <= SHORTEST:
        steps = _steps(x, a, reverse)
        states = _states(steps, h0)
        return _in_time([h.astype(x.dtype) for h in states], 1, reverse), states[-1]
    # Decay 1 and input 0 pass the state on, whichever way time runs.
    pad = ((0, 0), (0, -length % GROUP), (0, 0))
    grouped = (batch, -1, GROUP, width)
    x_groups = jnp.pad(x, pad).reshape(grouped)
    a_groups = jnp.pad(a, pad, constant_values=1).reshape(grouped)
    steps = _steps(x_groups, a_groups, reverse)
    ends, h_last = scan(*_summaries(steps), h0, reverse)
    states = _states(steps, _kept(shifted(ends, h0, towards_start=reverse)))
    y = _in_time(_kept([h.astype(x.dtype) for h in states]), 2, reverse)
    return y.reshape(batch, -1, width)[:, :length], h_last


def _steps(x, a, reverse):
    """Inputs and decays of every step along the last axis but one, in float32."""
    order = range(x.shape[-2])
    return [
        (x[..., t, :].astype(jnp.float32), a[..., t, :].astype(jnp.float32))
        for t in (reversed(order) if reverse else order)
    ]


def _summaries(steps):
    """End from zero and product of decays of each group, float32 [B, groups, D]."""
    end, product = steps[0]
    for x_t, a_t in steps[1:]:
        end, product = a_t * end + x_t, a_t * product
    return _kept((end, product))


def _states(steps, h):
    """The state after every step."""
    states = []
    for x_t, a_t in steps:
        h = a_t * h + x_t
        states.append(h)
    return states


def shifted(values: jax.Array, edge: jax.Array, *, towards_start: bool) -> jax.Array:
    """Values [B, T, D] moved by a step of time; `edge` [B, D] enters at the free end."""
    # Not a concatenation: the compiler for GPU fuses what follows one with nothing else.
    free, amounts = (
        (values.shape[1] - 1, (-1, 1, 0)) if towards_start else (0, (1, -1, 0))
    )
    zero, none = jnp.zeros((), values.dtype), (0, 0, 0)
    moved = jax.lax.pad(values, zero, (none, amounts, none))
    step = jnp.arange(values.shape[1])[None, :, None]
    return jnp.where(step == free, edge[:, None], moved)


def _in_time(states, axis, reverse):
    return jnp.stack(states[::-1] if reverse else states, axis)


def _kept(arrays):
    """Arrays that are computed once: else the compiler repeats what precedes them."""
    return jax.lax.optimization_barrier(arrays)
