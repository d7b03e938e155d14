"""Sums over long rows, chunk by chunk, with exact gradients in little memory.

Rows of T tokens are read in n chunks, each from the cache that the one before has left:

    cache_i, sums_i = read(chunk_i, cache_{i-1})            sums = sum of sums_i

The backward pass goes through the chunks in reverse, reads each once more from its
boundary cache, and hands the gradient of the cache to the chunk before. So nothing but
the boundary caches, whose size does not depend on T, and the activations of one chunk are
held. With `keep_every` k only every k-th boundary cache is held throughout; the k - 1
behind it are made again when the backward pass comes there, at the cost of one more
forward pass. That is all that a scan over checkpointed steps does, so the function is
differentiated, jitted and sharded like any other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from recurrentgemma import _validation as check
from recurrentgemma.cache import Cache, grows
from recurrentgemma.griffin import Griffin
from recurrentgemma.training.data import Batch

Sums = dict[str, jax.Array]
SumsOf = Callable[[Griffin, Batch, Any], tuple[Sums, Any]]
"""(model, batch, cache) -> (sums over the batch, cache after it)."""


def split_rows(batch: Batch, chunk_tokens: int, multiple: int = 1) -> Batch:
    """[B, T] -> [n, B, chunk_tokens], padded at the end of rows.

    Args:
      batch: any.
      chunk_tokens: tokens of a chunk.
      multiple: n is a multiple of it.
    """
    length = batch.tokens.shape[1]
    missing = -length % (chunk_tokens * multiple)

    def split(name, array):
        padding = -1 if name == "positions" else 0
        array = jnp.pad(array, ((0, 0), (0, missing)), constant_values=padding)
        return rearrange(array, "b (n c) -> n b c", c=chunk_tokens)

    return Batch(**{name: split(name, x) for name, x in batch._asdict().items()})


def first_cache(model: Griffin, batch_size: int, length: int) -> Cache:
    """The cache of rows that have read nothing and will read `length` tokens."""
    capacity = length if grows(model.config) else None
    return model.init_cache(batch_size, capacity=capacity)


def in_chunks(sums_of: SumsOf, chunk_tokens: int, keep_every: int = 1) -> SumsOf:
    """The same sums and the same gradients, with the memory of one chunk.

    Args:
      sums_of: sums over a batch, such as `step.batch_sums`: what they are sums of must
          be tokens, each of which belongs to one chunk.
      chunk_tokens: tokens of a chunk; shorter rows are read whole.
      keep_every: distance in chunks between the boundary caches that are held.

    Raises:
      ValueError: a number is less than 1.
    """
    check.positive_integer("chunk_tokens", chunk_tokens)
    check.positive_integer("keep_every", keep_every)

    def read(model, batch, cache=None):
        batch_size, length = batch.tokens.shape
        if length <= chunk_tokens:
            return sums_of(model, batch, cache)
        if cache is None:
            cache = first_cache(model, batch_size, length)
        group = min(keep_every, -(-length // chunk_tokens))

        def step(cache, chunk):
            sums, cache = sums_of(model, chunk, cache)
            return cache, sums

        # Inside a scan nothing is shared that a barrier would have to keep apart.
        run = jax.checkpoint(step, prevent_cse=False)
        chunks = split_rows(batch, chunk_tokens, group)
        if group > 1:
            chunks = jax.tree.map(
                lambda x: rearrange(x, "(n k) b c -> n k b c", k=group), chunks
            )
            run = jax.checkpoint(_scan(run), prevent_cse=False)
        cache, sums = jax.lax.scan(run, cache, chunks)
        axes = (0,) if group == 1 else (0, 1)
        return jax.tree.map(lambda x: jnp.sum(x, axes, x.dtype), sums), cache

    return read


def _scan(step):
    """A step over a group of chunks."""
    return lambda cache, chunks: jax.lax.scan(step, cache, chunks)
