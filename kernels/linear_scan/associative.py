"""The linear scan by `jax.lax.associative_scan`: log2(T) passes, parallel in time.

Two steps (a1, x1), (a2, x2) in time order compose to (a1 * a2, a2 * x1 + x2).
"""

import jax
import jax.numpy as jnp


def scan(
    x: jax.Array, a: jax.Array, h0: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """See `linear_scan`; h0 is float32 [B, D] here and T is at least 1."""

    def compose(earlier, later):
        a1, x1 = earlier
        a2, x2 = later
        return a1 * a2, a2 * x1 + x2

    first, last = (-1, 0) if reverse else (0, -1)
    a = a.astype(jnp.float32)
    wide = jnp.asarray(x, jnp.float32).at[:, first].add(a[:, first] * h0)
    _, h = jax.lax.associative_scan(compose, (a, wide), reverse=reverse, axis=1)
    return h.astype(x.dtype), h[:, last]
