"""Speculative decoding that draws the very tokens that plain decoding draws.

A round: the draft model proposes K tokens one by one; the model reads them all in one
call and makes its own choice at each place, with the key that this place has anyway
(Gumbel noise shared by both models). Proposals count as long as they are the model's
choices; the first that is not is replaced by it. So a round gives 1 to K + 1 tokens, and
the text is that of plain decoding to rounding: greedy or sampled, whatever the draft.

Both caches are rewindable, so that rejected tokens are taken back exactly.

Sources: speculative decoding is arXiv 2211.17192; sharing the noise instead of resampling
from a residual is arXiv 2408.07978, section 3 (accepted a little less often, but the text
does not depend on the draft).
"""

import functools

import jax
import jax.numpy as jnp

from recurrentgemma.cache import rewind
from recurrentgemma.generation.programs import (
    BLOCK_STEPS,
    BlockOutput,
    DecodeState,
    Program,
    advance,
    positions_of,
)
from recurrentgemma.generation.sampling import Sampling, log_prob, row_keys, sample
from recurrentgemma.griffin import Griffin


@functools.partial(
    Program,
    static_argnames=("num_draft_tokens", "keep_logits"),
    donate_argnames=("state",),
)
def speculate_block(
    models: tuple[Griffin, Griffin],
    state: DecodeState,
    sampling: Sampling,
    end_mask: jax.Array,
    count: jax.Array,
    stop_at: jax.Array,
    *,
    num_draft_tokens: int,
    keep_logits: bool,
) -> tuple[DecodeState, BlockOutput]:
    """`decode_block` in rounds, until a row has `count` tokens or no room for a round.

    Args: as there, but
      models: the model, and the draft, a model of the same tokens.
      state: `caches` are theirs, and can be rewound by `num_draft_tokens`.
      num_draft_tokens: K, at least 1 and less than BLOCK_STEPS (static).
    """
    model, draft = models
    vocab_size = model.config.vocab_size if keep_logits else None
    output = BlockOutput.empty(state.batch_size, vocab_size)
    before = state.steps

    def unfinished(carry):
        state, _ = carry
        drawn = jnp.max(state.steps - before)
        has_room = drawn + num_draft_tokens < BLOCK_STEPS
        enough_done = jnp.sum(state.done, dtype=jnp.int32) >= stop_at
        return (drawn < count) & has_room & ~enough_done

    def run(carry):
        state, output = carry
        cache, draft_cache = state.caches
        proposed, draft_cache = _propose(draft, state, sampling, num_draft_tokens)
        last_token = state.history.last_token[:, None]
        fed = jnp.concatenate([last_token, proposed], axis=1)
        lengths = jnp.where(state.done, 0, fed.shape[1])
        hidden, cache = model(fed, positions_of(cache, fed, lengths), cache)
        logits = model.logits(hidden)
        chosen = _choose(logits, proposed, state, sampling)

        is_right = jnp.cumprod(chosen[:, :-1] == proposed, axis=1, dtype=jnp.int32)
        ends = end_mask[chosen]
        is_open = jnp.cumprod(~ends[:, :-1], axis=1, dtype=jnp.int32)
        counts = 1 + jnp.sum(is_right * is_open, axis=1)
        counts = jnp.minimum(counts, state.limits - state.steps)
        counts = jnp.where(state.done, 0, counts)

        steps = jnp.arange(fed.shape[1], dtype=jnp.int32)[None]
        column = (state.steps - before)[:, None] + steps
        column = jnp.where(steps < counts[:, None], column, BLOCK_STEPS)
        row = jnp.arange(state.batch_size)[:, None]

        def put(all_, new):
            return all_.at[row, column].set(new, mode="drop")

        output = BlockOutput(
            put(output.tokens, chosen),
            put(output.log_probs, jax.vmap(log_prob, 1, 1)(logits, chosen)),
            put(output.logits, logits) if keep_logits else None,
            output.calls + ~state.done,
        )
        rejected = lengths - counts
        caches = (
            rewind(cache, model.config, rejected),
            rewind(draft_cache, draft.config, rejected),
        )
        return advance(state, caches, chosen, counts, end_mask), output

    with jax.named_scope("speculate_block"):
        return jax.lax.while_loop(unfinished, run, (state, output))


def _propose(draft, state, sampling, count):
    """`count` tokens of the draft, [B, count]; its cache has read all of them."""

    def step(carry, index):
        cache, history = carry
        positions = jnp.where(state.done, -1, cache.next_position)
        hidden, cache = draft(history.last_token[:, None], positions[:, None], cache)
        logits = draft.logits(hidden)[:, 0]
        keys = row_keys(state.seeds, state.steps + index)
        token = sample(logits, keys, sampling, history.seen)
        return (cache, history.append(token, True)), token

    # One step more than tokens, which reads the last of them.
    steps = jnp.arange(count + 1, dtype=jnp.int32)
    carry = (state.caches[1], state.history)
    (cache, _), tokens = jax.lax.scan(step, carry, steps)
    return tokens[:-1].T, cache


def _choose(logits, proposed, state, sampling):
    """The model's own token at every place, [B, K + 1], given the proposals before."""
    history, chosen = state.history, []
    for place in range(logits.shape[1]):
        keys = row_keys(state.seeds, state.steps + place)
        chosen.append(sample(logits[:, place], keys, sampling, history.seen))
        if place < proposed.shape[1]:
            history = history.append(proposed[:, place], True)
    return jnp.stack(chosen, axis=1)
