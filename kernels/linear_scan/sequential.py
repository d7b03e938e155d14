"""The linear scan one step at a time, on arrays left as they lie: for CPU.

`jax.lax.scan` wants time first, which costs three transposed copies; indexing the
middle axis costs none, and the result is written in place.
"""

import jax
import jax.numpy as jnp


def scan(
    x: jax.Array, a: jax.Array, h0: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""
    length = x.shape[1]

    def step(i, carry):
        h, y = carry
        t = length - 1 - i if reverse else i
        x_t = jax.lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False)
        a_t = jax.lax.dynamic_index_in_dim(a, t, axis=1, keepdims=False)
        h = a_t.astype(jnp.float32) * h + x_t.astype(jnp.float32)
        return h, jax.lax.dynamic_update_index_in_dim(y, h.astype(y.dtype), t, axis=1)

    h_last, y = jax.lax.fori_loop(0, length, step, (h0, jnp.zeros_like(x)))
    return y, h_last
