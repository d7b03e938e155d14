"""Exact gradients of rows of any length on one device, driven from the host.

The algorithm is that of `chunks.py`. Here the host runs one compiled program forward and
one backward for each chunk, so that no length compiles anything anew, the forward pass
leaves out the logits, and boundary caches may wait in the host's memory. Inside a jitted
train step use `chunks.in_chunks`.

Bytes of the boundary caches: `cost.cache_bytes` times n / keep_every + keep_every, for n
chunks. For 2^20 tokens of recurrentgemma-2b in bfloat16 that is 8.8 GB with chunks of
2048 tokens, and 0.78 GB if every 23rd is kept.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.griffin import Griffin
from recurrentgemma.training.chunks import first_cache, split_rows
from recurrentgemma.training.data import Batch
from recurrentgemma.training.state import Parameters, with_parameters
from recurrentgemma.training.step import Metrics, batch_sums


class LongGradients(NamedTuple):
    """Sums over the counted targets of rows, and the gradients of the sum `loss`.

    Divide gradients by `sums["tokens"]` for those of the mean; add sums and gradients
    of several batches before that.
    """

    sums: Metrics
    """Those of `step.batch_sums`: `loss` in nats, and the number of `tokens`."""
    parameters: Parameters
    """Gradients of the parameters that were asked for, by native name."""
    initial_cache: dict[str, jax.Array]
    """Gradients of the cache that the rows began with, by the names of
    `Cache.floating`."""
    cache: Cache
    """The cache after the rows."""


def long_gradients(
    model: Griffin,
    batch: Batch,
    cache: Cache | None = None,
    *,
    chunk_tokens: int = 2048,
    keep_every: int = 1,
    offload: bool = False,
    names: Iterable[str] | None = None,
) -> LongGradients:
    """Gradients equal to those of plain backpropagation, in the memory of one chunk.

    Example:
      >>> found = long_gradients(model, batch, chunk_tokens=2048)
      >>> mean_gradients = jax.tree.map(lambda g: g / found.sums["tokens"],
      ...                               found.parameters)

    Args:
      model: float32 or in the dtypes of inference; gradients are float32.
      batch: int32 and float32 [B, T], T of any size.
      cache: what the B rows have read before; None is nothing.
      chunk_tokens: tokens of a row that are read at once.
      keep_every: k, a boundary cache is held for every k-th chunk; the others are
          made again, which takes one more forward pass if k is not 1.
      offload: whether boundary caches wait in the host's memory.
      names: native names of the parameters whose gradients are wanted; None is all.

    Raises:
      ValueError: a number is less than 1, or a name is no parameter.
    """
    check.positive_integer("chunk_tokens", chunk_tokens)
    check.positive_integer("keep_every", keep_every)
    trained = _trained(model, names)
    batch_size, length = batch.tokens.shape
    if cache is None:
        cache = first_cache(model, batch_size, length)
    elif cache.capacity is not None:
        held = cache_lib.max_tokens_held(cache) or 0
        room = max(cache.capacity, held + length)
        cache = cache_lib.grow(cache, model.config, room)
    size = min(chunk_tokens, length)
    count = -(-length // size)
    rows = jax.tree.map(np.asarray, batch)

    def chunk(index: int) -> Batch:
        part = jax.tree.map(lambda x: x[:, index * size : (index + 1) * size], rows)
        if part.tokens.shape[1] == size:
            return part
        return jax.tree.map(lambda x: x[0], split_rows(part, size))

    # Boundaries in order of time; the last one that is there is the next to go back to.
    kept: list[Cache] = []
    reached: Cache = cache
    for index in range(count):
        if index % keep_every == 0:
            kept.append(jax.device_get(reached) if offload else reached)
        if index < count - 1:  # The backward pass makes the last cache.
            reached = _advance(model, chunk(index), reached)
    totals = _zeros(model, trained, chunk(0), reached)
    for start in reversed(range(0, count, keep_every)):
        boundaries = [kept.pop()]
        for index in range(start, min(start + keep_every, count) - 1):
            boundaries.append(_advance(model, chunk(index), boundaries[-1]))
        for index in reversed(range(start, start + len(boundaries))):
            before = boundaries.pop()
            totals, after = _go_back(model, trained, chunk(index), before, totals)
            reached = after if index == count - 1 else reached
    sums, parameters, initial_cache = totals
    return LongGradients(sums, parameters, initial_cache, reached)


def _trained(model: Griffin, names: Iterable[str] | None) -> Parameters:
    params = named_parameters(model)
    chosen = params if names is None else list(names)
    for name in chosen:
        if name not in params:
            check.refuse(
                "names", "native names of parameters", name, "see named_parameters"
            )
    return {name: params[name] for name in chosen}


@jax.jit
def _advance(model, chunk, cache):
    """The cache after a chunk; the compiler drops what makes the sums."""
    return batch_sums(model, chunk, cache)[1]


def _zeros(model, trained, chunk, cache):
    """Sums and gradients of nothing."""
    sums = jax.eval_shape(batch_sums, model, chunk, cache)[0]
    trees = sums, trained, cache.floating()
    # Sums of many chunks: float32, whatever the dtype of a parameter.
    return tuple(
        {name: jnp.zeros(leaf.shape, _sum_dtype(leaf)) for name, leaf in tree.items()}
        for tree in trees
    )


def _sum_dtype(leaf):
    return jnp.promote_types(leaf.dtype, jnp.float32)


@functools.partial(jax.jit, donate_argnums=4)
def _go_back(model, trained, chunk, cache, gradients):
    """Adds a chunk's part; the gradient of the cache becomes that before the chunk."""
    sums, d_trained, d_cache = gradients
    params = named_parameters(model)

    def run(trained, values):
        sums, after = batch_sums(
            with_parameters(model, params | trained),
            chunk,
            cache.with_floating(values),
        )
        return (sums["loss"], after.floating()), (sums, after)

    (loss, values), pull, (chunk_sums, after) = jax.vjp(
        run, trained, cache.floating(), has_aux=True
    )
    d_after = {name: d_cache[name].astype(values[name].dtype) for name in values}
    d_chunk, d_before = pull((jnp.ones_like(loss), d_after))
    sums = jax.tree.map(jnp.add, sums, chunk_sums)
    d_trained = jax.tree.map(jnp.add, d_trained, d_chunk)
    d_cache = {name: d_before[name].astype(d_cache[name].dtype) for name in d_cache}
    return (sums, d_trained, d_cache), after
