"""The definition of the linear scan: one step at a time, float32 carry."""

import jax
import jax.numpy as jnp


def scan(
    x: jax.Array, a: jax.Array, h0: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""

    def step(h, inputs):
        x_t, a_t = inputs
        h = a_t.astype(jnp.float32) * h + x_t.astype(jnp.float32)
        return h, h.astype(x.dtype)

    time_first = (jnp.swapaxes(x, 0, 1), jnp.swapaxes(a, 0, 1))
    h_last, y = jax.lax.scan(step, h0, time_first, reverse=reverse)
    return jnp.swapaxes(y, 0, 1), h_last
