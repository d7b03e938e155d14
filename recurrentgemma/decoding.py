"""The device programs of generation: read a chunk of a prompt, decode a block.

    state = {cache, last token (held back), steps, done}

The cache has seen every token of a row but the last one, which the next decode step
feeds: all steps are alike, and what a text leaves behind can be continued the same way.

A chunk is padded at the end of each row (position -1). A block is a `lax.while_loop` of
a given number of steps, which is not part of the program; it ends early when all rows
are done. A row that is done feeds padding, which its cache does not see. Caches are
donated and updated in place.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.cache import Cache
from recurrentgemma.griffin import Griffin
from recurrentgemma.sampling import Sampling, log_prob, row_keys, sample

CHUNK_SIZES = (16, 128, 1024)
"""Tokens of a row that one prefill call reads, smallest first."""
BLOCK_STEPS = 64
"""Most steps of a decode block."""

# A chunk padded by at most a quarter is cheaper than the smaller ones it replaces.
_FILLED = 0.75


class DecodeState(NamedTuple):
    """What decoding carries from block to block."""

    cache: Cache
    """The state of the model after all tokens of each row but the last."""
    token: jax.Array
    """int32 [B], the last token of each row, which the cache has not seen."""
    steps: jax.Array
    """int32 [B], tokens drawn so far."""
    done: jax.Array
    """bool [B], whether the row has drawn an end token."""


class BlockOutput(NamedTuple):
    """What the steps of a block gave; only a row's own steps are meaningful."""

    tokens: jax.Array
    """int32 [BLOCK_STEPS, B]."""
    log_probs: jax.Array
    """float32 [BLOCK_STEPS, B], of the tokens under the unfiltered model."""
    logits: jax.Array | None
    """float32 [BLOCK_STEPS, B, V], which the tokens were chosen from, if kept."""


def plan_chunks(length: int) -> list[int]:
    """Sizes of the chunks that read `length` tokens; the last may be padded.

    The largest that fits comes first; a larger one is taken where at most a quarter of
    it would be padding.
    """
    sizes = []
    while length > 0:
        fitting = [size for size in CHUNK_SIZES if size * _FILLED <= length]
        sizes.append(fitting[-1] if fitting else CHUNK_SIZES[0])
        length -= sizes[-1]
    return sizes


@functools.partial(jax.jit, static_argnames=("batch_size", "capacity"))
def new_cache(model: Griffin, *, batch_size: int, capacity: int | None) -> Cache:
    """`model.init_cache` as one program, in buffers of its own."""
    return model.init_cache(batch_size, capacity=capacity)


@functools.partial(jax.jit, donate_argnames=("cache",))
def read_chunk(
    model: Griffin, cache: Cache, tokens: jax.Array, lengths: jax.Array
) -> Cache:
    """The cache after the first `lengths` tokens of each row.

    Args:
      model: the model.
      cache: of B rows; donated.
      tokens: int32 [B, T].
      lengths: int32 [B], 0 to T.
    """
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = cache.next_position[:, None] + steps
    positions = jnp.where(steps < lengths[:, None], positions, -1)
    return model(tokens, positions, cache)[1]


@functools.partial(
    jax.jit, static_argnames=("keep_logits",), donate_argnames=("state",)
)
def decode_block(
    model: Griffin,
    state: DecodeState,
    seeds: jax.Array,
    sampling: Sampling,
    end_mask: jax.Array,
    count: jax.Array,
    *,
    keep_logits: bool,
) -> tuple[DecodeState, BlockOutput]:
    """Draws up to `count` tokens for each row; fewer when all rows are done.

    Args:
      model: the model.
      state: of B rows; donated.
      seeds: uint32 [B].
      sampling: how tokens are chosen.
      end_mask: bool [V], true at the tokens that end a row.
      count: int32 scalar, 0 to BLOCK_STEPS.
      keep_logits: whether the output holds logits (static).
    """
    batch_size, vocab_size = len(seeds), model.config.vocab_size
    shape = (BLOCK_STEPS, batch_size)
    output = BlockOutput(
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, vocab_size), jnp.float32) if keep_logits else None,
    )

    def unfinished(carry):
        step, state, _ = carry
        return (step < count) & ~jnp.all(state.done)

    def draw(carry):
        step, state, output = carry
        positions = jnp.where(state.done, -1, state.cache.next_position)
        hidden, cache = model(state.token[:, None], positions[:, None], state.cache)
        logits = model.logits(hidden)[:, 0]
        token = sample(logits, row_keys(seeds, state.steps), sampling)
        token = jnp.where(state.done, state.token, token)
        new = BlockOutput(token, log_prob(logits, token), logits)
        if not keep_logits:
            new = new._replace(logits=None)
        output = jax.tree.map(lambda all_, one: all_.at[step].set(one), output, new)
        state = DecodeState(
            cache,
            token,
            state.steps + jnp.where(state.done, 0, 1),
            state.done | end_mask[token],
        )
        return step + 1, state, output

    with jax.named_scope("decode_block"):
        carry = (jnp.int32(0), state, output)
        _, state, output = jax.lax.while_loop(unfinished, draw, carry)
    return state, output
