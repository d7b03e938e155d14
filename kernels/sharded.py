"""What passes between devices whose shards make a sequence, cut along time.

A recurrence h_t = a_t h_{t-1} + x_t is affine in its first state: from h0 a shard ends at
`end + product * h0`, with `end` its end from zero and `product` that of its decays. Both
are a reduction, whose levels halve in size. All devices exchange them, each scans over one
state for each shard, and then runs the op on its shard once, from the state that reaches
it. A convolution gets the last inputs of the shard before, attention the keys that its
window holds (`local_attention/shards.py`).

These functions run inside `meshes.run_along_time`; `axis` is the mesh axis. They are
differentiable: gradients pass through the ring of devices the other way.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def start_state(
    x: jax.Array, a: jax.Array, h0: jax.Array, axis: str, *, reverse: bool = False
) -> jax.Array:
    """The state that a scan over the whole sequence has before this device's shard.

    Args:
      x, a: inputs and decays of the shard [B, T, D].
      h0: state before the whole sequence [B, D], float32.
      axis: the mesh axis.
      reverse: whether the scan runs from the last step to the first.

    Returns:
      float32 [B, D].
    """
    gathered = (jax.lax.all_gather(part, axis) for part in _reduce(x, a, reverse))

    def pass_shard(h, shard):
        end, product = shard
        return end + product * h, h

    _, starts = jax.lax.scan(pass_shard, h0, tuple(gathered), reverse=reverse)
    return starts[jax.lax.axis_index(axis)]


def _reduce(x, a, reverse):
    """The end of a scan from zero, and the product of its decays; float32 [B, D]."""
    x, a = x.astype(jnp.float32), a.astype(jnp.float32)
    while (length := x.shape[1]) > 1:
        pairs = length // 2 * 2
        first, second = slice(0, pairs, 2), slice(1, pairs, 2)
        if reverse:
            first, second = second, first
        rest = x[:, pairs:], a[:, pairs:]
        x, a = a[:, second] * x[:, first] + x[:, second], a[:, second] * a[:, first]
        if length > pairs:
            x, a = (
                jnp.concatenate(pair, axis=1) for pair in zip((x, a), rest, strict=True)
            )
    return x[:, 0], a[:, 0]


def last_state(state: jax.Array, axis: str, *, reverse: bool = False) -> jax.Array:
    """The state of the shard that a scan passes last, on every device."""
    last = 0 if reverse else jax.lax.psum(1, axis) - 1
    return _from_device(state, jax.lax.axis_index(axis) == last, axis)


def of_last_token(states: Any, positions: jax.Array, axis: str) -> Any:
    """The states [B, ...] of the shard that has each row's last token, on every device.

    Args:
      states: pytree of arrays, after the shard.
      positions: int32 [B, T] of the shard; -1 is padding, at the end of rows alone.
      axis: the mesh axis.
    """
    index = jax.lax.axis_index(axis)
    filled = jnp.any(positions >= 0, axis=1)
    last = jax.lax.pmax(jnp.where(filled, index, 0), axis)
    return jax.tree.map(lambda state: _from_device(state, last == index, axis), states)


def _from_device(state, is_here, axis):
    """A state, or rows of one, from the device where `is_here` [] or [B] holds."""
    is_here = jnp.expand_dims(is_here, range(is_here.ndim, state.ndim))
    return jax.lax.psum(jnp.where(is_here, state, jnp.zeros_like(state)), axis)


def halo(x: jax.Array, before: jax.Array, axis: str) -> jax.Array:
    """The inputs before a shard: `before` [B, S, ...] is what the first shard gets.

    Args:
      x: inputs of the shard [B, T, ...], T at least S.
      before: inputs before the whole sequence.
      axis: the mesh axis.
    """
    received = shift(x[:, x.shape[1] - before.shape[1] :], 1, axis)
    is_first = jax.lax.axis_index(axis) == 0
    return jnp.where(is_first, before.astype(x.dtype), received)


def shift(array: jax.Array, distance: int, axis: str) -> jax.Array:
    """The array of the device `distance` shards before; zeros where there is none."""
    devices = jax.lax.psum(1, axis)
    route = [(i, i + distance) for i in range(devices - distance)]
    return jax.lax.ppermute(array, axis, route)


def take_along_time(axis: str, values: jax.Array, index: jax.Array) -> jax.Array:
    """values[b, index[b, t]] of whole sequences, for the tokens of this shard.

    Shards go round the ring, so that no device holds more than two of them.

    Args:
      axis: the mesh axis.
      values: [B, T, ...] of the shard.
      index: int32 [B, T] of the shard, places in the whole sequence.
    """
    devices, here = jax.lax.psum(1, axis), jax.lax.axis_index(axis)
    length = values.shape[1]
    route = [(i, (i + 1) % devices) for i in range(devices)]
    expand = partial(jnp.expand_dims, axis=tuple(range(2, values.ndim)))

    def take(carry, step):
        taken, visiting = carry
        local = index - (here - step) % devices * length
        found = jnp.take_along_axis(visiting, expand(local), axis=1, mode="clip")
        is_here = expand((local >= 0) & (local < length))
        taken = jnp.where(is_here, found, taken)
        return (taken, jax.lax.ppermute(visiting, axis, route)), None

    start = (jnp.zeros_like(values), values)
    (taken, _), _ = jax.lax.scan(take, start, jnp.arange(devices))
    return taken
