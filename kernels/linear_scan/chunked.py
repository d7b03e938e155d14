"""The linear scan in chunks of time that run side by side: for GPUs without a kernel.

Time is cut into n chunks of C steps. First, in C steps for all chunks together: each
chunk's product of decays and its last state when started from zero. Then, in n steps:
the state with which each chunk really starts. Then C steps again, from those states.
x and a are read twice and y is written once. 2 C + n is least at n = sqrt(2 T).
"""

import math

import jax
import jax.numpy as jnp


def scan(
    x: jax.Array, a: jax.Array, h0: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""
    batch, length, width = x.shape
    chunk = math.ceil(length / math.ceil(math.sqrt(2 * length)))
    padding = -length % chunk
    pad = ((0, 0), (0, padding), (0, 0))
    # Decay 1 and input 0 pass the state on, whichever way time runs.
    x = jnp.pad(x, pad).reshape(batch, -1, chunk, width)
    a = jnp.pad(a, pad, constant_values=1).reshape(x.shape)

    def at(i):
        t = chunk - 1 - i if reverse else i
        x_t = jax.lax.dynamic_index_in_dim(x, t, axis=2, keepdims=False)
        a_t = jax.lax.dynamic_index_in_dim(a, t, axis=2, keepdims=False)
        return t, x_t.astype(jnp.float32), a_t.astype(jnp.float32)

    def summarise(i, carry):
        product, h = carry
        _, x_t, a_t = at(i)
        return a_t * product, a_t * h + x_t

    zeros = jnp.zeros_like(x[:, :, 0], jnp.float32)
    products, ends = jax.lax.fori_loop(0, chunk, summarise, (zeros + 1, zeros))

    def carry_over(h, summary):
        product, end = summary
        return product * h + end, h

    h_last, starts = jax.lax.scan(
        carry_over,
        h0,
        (jnp.swapaxes(products, 0, 1), jnp.swapaxes(ends, 0, 1)),
        reverse=reverse,
    )

    def step(i, carry):
        h, y = carry
        t, x_t, a_t = at(i)
        h = a_t * h + x_t
        return h, jax.lax.dynamic_update_index_in_dim(y, h.astype(y.dtype), t, axis=2)

    carry = (jnp.swapaxes(starts, 0, 1), jnp.zeros_like(x))
    _, y = jax.lax.fori_loop(0, chunk, step, carry)
    return y.reshape(batch, -1, width)[:, :length], h_last
