"""Sliding-window and global attention of a chunk to [cache, chunk], then the write.

Implementations compute the output, and their gradients those of q, k, v and the cached
keys and values; the ring is written here, once for all of them.
"""

from functools import partial

import jax
import jax.numpy as jnp

from recurrentgemma.kernels import meshes, sharded
from recurrentgemma.kernels.checks import (
    MAX_COUNT,
    check_array,
    check_arrays,
    check_kind,
    integer,
    number,
)
from recurrentgemma.kernels.dispatch import EVERYWHERE, Implementation, Op, call
from recurrentgemma.kernels.local_attention import (
    blocked,
    cudnn,
    one_query,
    reference,
    ring,
    shards,
    splash,
    streamed,
    tokamax,
)
from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings
from recurrentgemma.kernels.local_attention.ring import KVCache


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
      window: how many past keys a query sees, at least 1; None is all of its document.
      scale: factor of the scores, finite.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap), finite and above 0;
        None is no cap.
      implementation: name of `IMPLEMENTATIONS`; None is the best for the platform.

    Returns:
      out: [B, T, N, H] in q's dtype.
      cache: the cache after the chunk, in the dtype of the one given. Without one:
        `window` slots (T if that is None) in the dtypes of k and v.

    Raises:
      ValueError: shapes or dtypes do not fit, or a number is out of its range.
      NotImplementedError: the named implementation does not exist or cannot run.

    Source: Griffin, arXiv 2402.19427, section 2.3.
    """
    _validate(q, k, v, positions, cache, window)
    scale = number("scale", scale)
    if soft_cap is not None:
        soft_cap = number("soft_cap", soft_cap, above=0)
    settings = Settings(window, scale, soft_cap)

    def attend_and_write(q, k, v, positions, *cache):
        given = None if cache[0] is None else KVCache(*cache)
        kept = given or ring.empty(k, v, 0)
        chunk = Chunk(q, k, v, positions, kept)
        out, _ = call(LOCAL_ATTENTION, implementation, chunk, settings=settings)
        if k.shape[1] == 1 or window is None:
            positions = ring.after(out, positions)
        kept = given or ring.empty(k, v, slots)
        write = ring.write_in_place if window is None else ring.write
        return out, *write(*meshes.vary_alike((kept, k, v, positions)))

    def on_shards(axis, q, k, v, positions, *cache):
        if cache[0] is None:
            cache = ring.empty(k, v, slots)
        before = shards.ring_before(KVCache(*cache), k, v, positions, axis)
        out, *after = attend_and_write(q, k, v, positions, *before)
        return out, *sharded.of_last_token(after, positions, axis)

    slots = k.shape[1] if window is None else window
    kept = KVCache(None, None, None) if cache is None else cache
    arguments = (q, k, v, positions, *kept)
    dims = f"{ARGUMENTS}->btnh,bskh,bskh,bs"
    run = partial(meshes.run_along_time, dims, attend_and_write, on_shards)
    specs = partial(meshes.result_specs, dims, arguments)
    out, *after = meshes.with_auto_axes(run, specs, *arguments)
    return out, KVCache(*after)


ARGUMENTS = "btnh,btkh,btkh,bt,bskh,bskh,bs"
IMPLEMENTATIONS = {
    "one_query": Implementation(
        one_query.attend, default_on=EVERYWHERE, supports=one_query.supports
    ),
    "splash": Implementation(
        splash.attend,
        splash.gradients,
        kernel_for="tpu",
        default_on=("tpu",),
        supports=splash.supports,
    ),
    "streamed": Implementation(
        streamed.attend,
        blocked.gradients,
        default_on=EVERYWHERE,
        supports=streamed.supports,
    ),
    "blocked": Implementation(blocked.attend, blocked.gradients, default_on=EVERYWHERE),
    "tokamax": Implementation(
        tokamax.attend,
        tokamax.gradients,
        kernel_for="cuda",
        supports=tokamax.supports,
    ),
    "cudnn": Implementation(
        cudnn.attend, cudnn.gradients, kernel_for="cuda", supports=cudnn.supports
    ),
    "reference": Implementation(reference.attend),
}
"""Give the output, and the logarithm of the sum of weights, float32 [B, T, N], which only
the entry's own gradient reads."""
LOCAL_ATTENTION = Op("local_attention", f"{ARGUMENTS}->btnh,btn", IMPLEMENTATIONS)


def _validate(q, k, v, positions, cache, window):
    check_array("q", q)
    check_array("k", k)
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(
            f"q: expected shape [B, T, N, H] with T >= 1, got {q.shape}; "
            "add the missing axis, or skip the call for an empty chunk."
        )
    batch, length, heads, head_dim = q.shape
    if k.ndim != 4 or k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(
            f"k: expected shape [B, T, K, H] with K a divisor of the {heads} query "
            f"heads, got {k.shape}; give each group of query heads one key head."
        )
    if window is not None:
        advice = "None is the whole document."
        integer("window", window, least=1, most=MAX_COUNT, advice=advice)
    shape = (batch, length, k.shape[2], head_dim)
    expected = {
        "q": (q, q.shape, jnp.floating),
        "k": (k, shape, jnp.floating),
        "v": (v, shape, jnp.floating),
        "positions": (positions, (batch, length), jnp.int32),
    }
    if cache is not None:
        check_kind("cache", cache, KVCache)
        check_array("cache.positions", cache.positions)
        slots = cache.positions.shape[-1] if cache.positions.ndim else 0
        if window is not None and slots < window:
            raise ValueError(
                f"cache.positions: expected at least {window} slots, one for each past "
                f"key that a query sees, got {slots}; make the cache for this window."
            )
        shape = (batch, slots, *shape[2:])
        expected |= {
            "cache.keys": (cache.keys, shape, jnp.floating),
            "cache.values": (cache.values, shape, jnp.floating),
            "cache.positions": (cache.positions, (batch, slots), jnp.integer),
        }
    check_arrays(expected)
