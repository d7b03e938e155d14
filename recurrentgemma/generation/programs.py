"""The device programs of generation: read a chunk, score a chunk, decode a block.

    state = {caches, history, seed, steps, limit, done} by row

A decode step feeds the last token of a row's history, which the cache has not seen: all
steps are alike, and any text that was read can be continued the same way.

A chunk is padded at the end of each row (position -1). A block is a `lax.while_loop` of
a given number of steps, which is not part of the program; it ends early when enough rows
are done. A row that is done feeds padding, which its cache does not see; another row may
then take its slot. Caches are donated and updated in place, except by scoring.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.cache import Cache
from recurrentgemma.generation.history import History
from recurrentgemma.generation.sampling import Sampling, log_prob, row_keys, sample
from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels import meshes

CHUNK_SIZES = (16, 128, 1024)
"""Tokens of a row that one prefill call reads, smallest first."""
BLOCK_STEPS = 64
"""Most steps of a decode block."""
MAX_BATCH_SIZES = 8
"""Batch sizes whose programs stay in memory: those that ran last."""

# A chunk padded by at most a quarter is cheaper than the smaller ones it replaces.
_FILLED = 0.75
# Logits that scoring holds at once, in tokens.
_SCORED_TOKENS = 128


class DecodeState(NamedTuple):
    """What decoding carries from block to block; batch axis first in every leaf."""

    caches: tuple[Cache, ...]
    """The cache of the model and, if there is a draft model, the draft's: both have
    seen all tokens of each row but the last."""
    history: History
    seeds: jax.Array
    """uint32 [B]."""
    steps: jax.Array
    """int32 [B], tokens drawn so far."""
    limits: jax.Array
    """int32 [B], how many tokens each row may draw."""
    done: jax.Array
    """bool [B], whether the row draws no more."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.done.shape[0]


class BlockOutput(NamedTuple):
    """Tokens that a block drew: the first entries of each row, as many as its steps."""

    tokens: jax.Array
    """int32 [B, BLOCK_STEPS]."""
    log_probs: jax.Array
    """Log-probabilities under the unfiltered model, float32 [B, BLOCK_STEPS]."""
    logits: jax.Array | None
    """The model's logits before every token, float32 [B, BLOCK_STEPS, V], if kept."""
    calls: jax.Array
    """Calls of the model for each row, int32 [B]."""

    @classmethod
    def empty(cls, batch_size: int, vocab_size: int | None) -> "BlockOutput":
        """An output for a block to fill; no logits if vocab_size is None."""
        shape = (batch_size, BLOCK_STEPS)
        return cls(
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            None if vocab_size is None else jnp.zeros((*shape, vocab_size)),
            jnp.zeros((batch_size,), jnp.int32),
        )


class Program:
    """`jax.jit` of a function, with the programs of the last few batch sizes.

    The first cache or state among the arguments tells the batch size. Programs live as
    long as the function that `jax.jit` got, which is another one for each batch size.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        functools.update_wrapper(self, function)
        self.jitted = functools.lru_cache(MAX_BATCH_SIZES)(
            lambda _: jax.jit(meshes.as_program(function), **options)
        )
        """The compiled function for a batch size."""

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        batch_size = next(x.batch_size for x in arguments if hasattr(x, "batch_size"))
        return self.jitted(batch_size)(*arguments, **static)


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
@meshes.as_program
def new_cache(model: Griffin, *, batch_size: int, capacity: int | None) -> Cache:
    """`model.init_cache` as one program, in buffers that may be donated."""
    return model.init_cache(batch_size, capacity=capacity)


@functools.partial(Program, donate_argnames=("cache",))
def read_chunk(
    model: Griffin, cache: Cache, tokens: jax.Array, lengths: jax.Array
) -> Cache:
    """The cache, which is donated, after the first `lengths` tokens, int32 [B], of each
    row of `tokens`, int32 [B, T]."""
    return model(tokens, positions_of(cache, tokens, lengths), cache)[1]


@Program
def score_chunk(
    model: Griffin,
    cache: Cache,
    tokens: jax.Array,
    targets: jax.Array,
    lengths: jax.Array,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Scores of the tokens that follow, and the cache after the chunk.

    Arguments as for `read_chunk`, but the cache stays valid; `targets`, int32 [B, T],
    are the tokens after each of `tokens`; T is at most 128 or a multiple of it.

    Returns:
      Log-probabilities of the targets, float32 [B, T]; whether each is the most probable
      token, bool [B, T] (both meaningless past a row's length); and the cache.
    """
    hidden, cache = model(tokens, positions_of(cache, tokens, lengths), cache)
    batch_size, length, width = hidden.shape
    part = min(length, _SCORED_TOKENS)

    def score(part):
        hidden, targets = part
        logits = model.logits(hidden)
        flat = log_prob(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        return flat.reshape(targets.shape), jnp.argmax(logits, axis=-1) == targets

    parts = (
        hidden.reshape(batch_size, -1, part, width).swapaxes(0, 1),
        targets.reshape(batch_size, -1, part).swapaxes(0, 1),
    )
    log_probs, is_best = (
        scores.swapaxes(0, 1).reshape(batch_size, length)
        for scores in jax.lax.map(score, parts)
    )
    return log_probs, is_best, cache


@functools.partial(Program, donate_argnames=("state",))
def place_row(state: DecodeState, row: DecodeState, slot: jax.Array) -> DecodeState:
    """`state`, which is donated, with the only row of `row` in a slot."""
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one[0]), state, row)


@functools.partial(
    Program, static_argnames=("keep_logits",), donate_argnames=("state",)
)
def decode_block(
    models: tuple[Griffin],
    state: DecodeState,
    sampling: Sampling,
    end_mask: jax.Array,
    count: jax.Array,
    stop_at: jax.Array,
    *,
    keep_logits: bool,
) -> tuple[DecodeState, BlockOutput]:
    """Draws up to `count` tokens for each row; fewer when enough rows are done.

    Args:
      models: the model alone.
      state: B rows, one cache; donated.
      sampling: how tokens are chosen.
      end_mask: bool [V], true at the tokens that end a row.
      count: int32 scalar, 0 to BLOCK_STEPS.
      stop_at: int32 scalar, the number of rows done at which the block ends.
      keep_logits: whether the output holds logits (static).
    """
    [model] = models
    vocab_size = model.config.vocab_size if keep_logits else None

    def unfinished(carry):
        step, state, _ = carry
        return (step < count) & (jnp.sum(state.done, dtype=jnp.int32) < stop_at)

    def draw(carry):
        step, state, output = carry
        [cache] = state.caches
        history = state.history
        positions = jnp.where(state.done, -1, cache.next_position)
        hidden, cache = model(history.last_token[:, None], positions[:, None], cache)
        logits = model.logits(hidden)[:, 0]
        keys = row_keys(state.seeds, state.steps)
        token = sample(logits, keys, sampling, history.seen)
        counts = jnp.where(state.done, 0, 1)
        output = BlockOutput(
            output.tokens.at[:, step].set(token),
            output.log_probs.at[:, step].set(log_prob(logits, token)),
            output.logits.at[:, step].set(logits) if keep_logits else None,
            output.calls + counts,
        )
        state = advance(state, (cache,), token[:, None], counts, end_mask)
        return step + 1, state, output

    with jax.named_scope("decode_block"):
        output = BlockOutput.empty(state.batch_size, vocab_size)
        carry = (jnp.int32(0), state, output)
        return jax.lax.while_loop(unfinished, draw, carry)[1:]


def advance(
    state: DecodeState,
    caches: tuple[Cache, ...],
    tokens: jax.Array,
    counts: jax.Array,
    end_mask: jax.Array,
) -> DecodeState:
    """The state after the first `counts`, int32 [B], of `tokens`, int32 [B, K]."""
    history = state.history
    for place in range(tokens.shape[1]):
        history = history.append(tokens[:, place], place < counts)
    steps = state.steps + counts
    done = state.done | end_mask[history.last_token] | (steps >= state.limits)
    return state._replace(caches=caches, history=history, steps=steps, done=done)


def positions_of(cache: Cache, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """int32 [B, T]: each row continued for its length, then padding."""
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = cache.next_position[:, None] + steps
    return jnp.where(steps < lengths[:, None], positions, -1)
