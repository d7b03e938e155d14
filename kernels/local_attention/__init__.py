"""Sliding-window and global attention of a chunk to [cache, chunk], then the write.

Implementations compute the output, and their gradients those of q, k, v and the cached
keys and values; the ring is written here, once for all of them.
"""

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import Kernel, Table, dispatch
from recurrentgemma.kernels.local_attention import (
    blocked,
    one_query,
    reference,
    ring,
    splash,
)
from recurrentgemma.kernels.local_attention.ring import KVCache
from recurrentgemma.kernels.precision import custom_vjp

_ARRAYS = "btnh,btkh,btkh,bt,bskh,bskh,bs"

IMPLEMENTATIONS: Table = {
    "reference": reference.attend,
    "blocked": blocked.attend,
    "splash": Kernel(splash.attend, "tpu", f"{_ARRAYS}->btnh,btn", splash.supports),
}
"""Give the output, and the logarithm of the sum of weights, float32 [B, T, N]."""
GRADIENTS: Table = {
    "reference": reference.gradients,
    "blocked": blocked.gradients,
    "splash": Kernel(
        splash.gradients,
        "tpu",
        f"{_ARRAYS},btnh,btn,btnh->btnh,btkh,btkh,bskh,bskh",
        splash.supports,
    ),
}
"""Take the arguments, both results and the gradient of the output."""
PLATFORM_DEFAULTS = {"tpu": ("splash", "blocked"), "default": ("blocked",)}


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    cache: KVCache | None,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    implementation: str | None = None,
) -> tuple[jax.Array, KVCache]:
    """Attention of a chunk to its own document: in the cache and in the chunk.

    A query at position p sees the keys at positions p - window to p of its document,
    window + 1 keys. Softmax and soft cap are float32; matrix products take the inputs'
    dtype and accumulate in float32. Differentiable in q, k, v and the cache, through
    both results. The result does not depend on how a sequence is split into chunks.

    Args:
      q: queries [B, T, N, H], after the rotary embedding.
      k: keys [B, T, K, H], K divides N; query head n uses key head n // (N / K).
      v: values [B, T, K, H].
      positions: int32 [B, T]. 0 starts a document, otherwise previous + 1, where the
        previous of the first token is the newest in the cache (an empty row may begin
        anywhere). -1 is padding, at the end of a row only; its output is finite.
      cache: the tokens before the chunk, at least `window` slots (for global attention
        any number, which the row's positions must stay below); None if there are none.
      window: how many past keys a query sees; None is all of its document.
      scale: factor of the scores.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); None is no cap.
      implementation: a name of `IMPLEMENTATIONS`; None picks by platform.

    Returns:
      out: [B, T, N, H] in q's dtype.
      cache: the cache after the chunk, in the dtype of the one given. Without one:
        `window` slots (T if that is None) in the dtypes of k and v.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: there is no such implementation.

    Source: Griffin, arXiv 2402.19427, section 2.3.
    """
    _validate(q, k, v, positions, cache, window)

    one_query_serves = implementation in (None, "blocked", "splash")
    if cache is not None and q.shape[1] == 1 and one_query_serves:
        out = one_query.attend(q, k, v, positions, cache, window, scale, soft_cap)
    else:
        options = (("window", window), ("scale", scale), ("soft_cap", soft_cap))
        kept = _no_slots(k, v) if cache is None else cache
        out = _attend(q, k, v, positions, *kept, options, implementation)
    if cache is None:
        slots = k.shape[1] if window is None else window
    else:
        slots = cache.positions.shape[1]
    if k.shape[1] == 1:
        positions = ring.after(out, positions)
    return out, ring.write(cache, k, v, positions, slots)


def _no_slots(k: jax.Array, v: jax.Array) -> KVCache:
    return KVCache(k[:, :0], v[:, :0], jnp.zeros((k.shape[0], 0), jnp.int32))


def _output(*arguments) -> jax.Array:
    *arrays, options, implementation = arguments
    return _run(IMPLEMENTATIONS, "", arrays, options, implementation)[0]


def _attend_forward(*arguments):
    *arrays, options, implementation = arguments
    results = _run(IMPLEMENTATIONS, "", arrays, options, implementation)
    return results[0], (*arrays, *results)


def _attend_backward(options, implementation, residuals, out_gradient):
    arrays = (*residuals, out_gradient)
    dq, dk, dv, dkeys, dvalues = _run(
        GRADIENTS, "'s gradient", arrays, options, implementation
    )
    return dq, dk, dv, None, dkeys, dvalues, None


_attend = custom_vjp(_output, _attend_forward, _attend_backward, static=(7, 8))


def _run(table, part, arrays, options, implementation):
    return dispatch(
        f"local_attention{part}",
        table,
        PLATFORM_DEFAULTS,
        implementation,
        *arrays,
        **dict(options),
    )


def _validate(q, k, v, positions, cache, window):
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(
            f"q must have shape [B, T, N, H] with T >= 1; got {q.shape}. "
            "Add the missing axis, or skip the call for an empty chunk."
        )
    batch, length, heads, head_dim = q.shape
    if k.ndim != 4 or k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(
            f"k must have shape [B, T, K, H] with K a divisor of the {heads} query "
            f"heads; got {k.shape}."
        )
    expected = (batch, length, k.shape[2], head_dim)
    for name, array in (("k", k), ("v", v)):
        if array.shape != expected:
            raise ValueError(
                f"{name} must have shape {expected} beside q {q.shape}; "
                f"got {array.shape}."
            )
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point; got {array.dtype}.")
    if positions.shape != (batch, length) or positions.dtype != jnp.int32:
        raise ValueError(
            f"positions must be int32 {(batch, length)}; "
            f"got {positions.dtype} {positions.shape}."
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None; got {window}.")
    if cache is None:
        return
    slots = cache.positions.shape[-1]
    if window is not None and slots < window:
        raise ValueError(
            f"cache must have at least {window} slots, one for each past key that a "
            f"query sees; got {slots}."
        )
    for name, array, shape in (
        ("cache.keys", cache.keys, (batch, slots, *k.shape[2:])),
        ("cache.values", cache.values, (batch, slots, *k.shape[2:])),
        ("cache.positions", cache.positions, (batch, slots)),
    ):
        if array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} beside k {k.shape} and {slots} "
                f"positions; got {array.shape}."
            )
