"""How rows are read in training: what they begin with, and whole or in chunks.

A model that has always begun with an empty state has seen the states of short texts
alone, and may do badly once a text is longer than its rows. Four other beginnings bring
it to other states (arXiv 2507.02782, section 4):

    noise         independent Gaussian numbers of one standard deviation
    fitted_noise  Gaussian numbers of the mean and the standard deviation that each
                  layer's states had at the end of the last step's rows
    passed        the state after another row of the last step
    carried       the state after the same row of the last step: truncated
                  backpropagation; the batches must hold the rows' next tokens

No gradient flows into a beginning. A row's first document goes on after the state it was
given, at the positions that follow; further documents of the row begin with nothing, as
always. A carried row that does not go on where the last one ended begins with nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma import _validation as check
from recurrentgemma.cache import Cache, grows, take
from recurrentgemma.griffin import Griffin
from recurrentgemma.training.chunks import SumsOf, in_chunks
from recurrentgemma.training.data import Batch
from recurrentgemma.training.options import option

CARRIED = "carried"
INITIAL_STATES = ("zero", "noise", "fitted_noise", "passed", CARRIED)


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """How the rows of a batch are read.

    Raises:
      ValueError: a value is outside its range.
    """

    initial_state: str = option(
        "what a row begins with: zero (nothing), noise, fitted_noise (like the states "
        "at the ends of rows), passed (the state after another row) or carried (that "
        "after the row's last segment)",
        default="zero",
    )
    noise_std: float = option("standard deviation of the noise", default=1.0)
    chunk_tokens: int = option(
        "tokens of a row that are read at once, with exact gradients of the whole row; "
        "0 reads rows whole",
        default=0,
    )
    state_every: int = option(
        "distance in chunks between the states that are held for the backward pass",
        default=1,
    )

    def __post_init__(self):
        check.choice("initial_state", self.initial_state, INITIAL_STATES)
        check.number("noise_std", self.noise_std, above=0)
        check.integer("chunk_tokens", self.chunk_tokens, least=0)
        check.positive_integer("state_every", self.state_every)


class Rows(NamedTuple):
    """What the rows of a batch are handed from the step before; batch axis first."""

    cache: Cache
    """The cache after the rows of the last step; empty before the first."""
    row: jax.Array
    """int32 [B], index of the row."""
    step: jax.Array
    """int32 [B], number of steps done; with `row` it decides the noise."""


def init_rows(config: RowsConfig, model: Griffin, batch_size: int) -> Rows | None:
    """What `TrainState.rows` is before the first step.

    Args:
      config: how rows are read.
      model: a model with values for its parameters.
      batch_size: B.

    Returns:
      None if rows begin with nothing.

    Raises:
      ValueError: the model's cache grows with the text, so that no state of one size
          can be handed on.
    """
    if config.initial_state == "zero":
        return None
    if grows(model.config):
        raise ValueError(
            "initial_state: expected zero for a model with global attention, whose "
            f"cache grows with the text, got {config.initial_state}"
        )
    row = jnp.arange(batch_size, dtype=jnp.int32)
    return Rows(model.init_cache(batch_size), row, jnp.zeros_like(row))


def reading(config: RowsConfig, sums_of: SumsOf, seed: int = 0) -> SumsOf:
    """A function that reads rows as the config says.

    Args:
      config: how rows are read.
      sums_of: (model, batch, cache) -> (sums, cache), such as `step.batch_sums`.
      seed: of the noise.

    Returns:
      (model, batch, rows) -> (sums, rows after the step), where rows are what
      `init_rows` or the step before has made. It is differentiable in the model.
    """
    if config.chunk_tokens:
        sums_of = in_chunks(sums_of, config.chunk_tokens, config.state_every)
    if config.initial_state == "zero":
        return sums_of

    def read(model, batch, rows):
        if rows is None:  # An evaluation begins with nothing.
            return sums_of(model, batch, None)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows.row)
        keys = jax.vmap(jax.random.fold_in)(keys, rows.step)
        batch, cache = _begin(config, model, batch, rows.cache, keys)
        sums, cache = sums_of(model, batch, jax.lax.stop_gradient(cache))
        cache = jax.lax.stop_gradient(cache)
        return sums, rows._replace(cache=cache, step=rows.step + 1)

    return read


def continued_positions(positions: jax.Array, next_position: jax.Array) -> jax.Array:
    """Positions of rows whose first document goes on after a state.

    Args:
      positions: int32 [B, T] of rows that begin with nothing.
      next_position: int32 [B], the position of the first token.

    Returns:
      int32 [B, T]; padding and the row's further documents are as they were.
    """
    is_token = positions >= 0
    index = jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1
    is_first = ~in_later_document(positions)
    first = next_position[:, None] + index
    return jnp.where(is_token & is_first, first, positions)


def in_later_document(positions: jax.Array) -> jax.Array:
    """Whether each token, [B, T], is of another document than the row's first."""
    is_token = positions >= 0
    index = jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - 1
    return jnp.cumsum((positions == 0) & (index > 0), axis=1) > 0


def _begin(config, model, batch, carried, keys) -> tuple[Batch, Cache]:
    """The batch at its positions, and the cache that its rows begin with."""
    size = carried.batch_size
    empty = model.init_cache(size)
    if config.initial_state == CARRIED:
        first = _first_position(batch.positions)
        goes_on = (first == carried.next_position) | (first < 0)
        return batch, _choose(goes_on, carried, empty)
    if config.initial_state == "passed":
        cache = take(carried, jnp.roll(jnp.arange(size), 1))
    else:
        like = carried if config.initial_state == "fitted_noise" else None
        cache = _noise(empty, like, config.noise_std, keys)
    positions = continued_positions(batch.positions, cache.next_position)
    return batch._replace(positions=positions), cache


def _first_position(positions):
    """Position of each row's first token, int32 [B]; -1 if it has none."""
    place = jnp.argmax(positions >= 0, axis=1)
    return jnp.take_along_axis(positions, place[:, None], axis=1)[:, 0]


def _choose(mask, chosen, other):
    """The rows of one cache where mask, bool [B], and those of the other elsewhere."""

    def choose(chosen, other):
        shape = (-1,) + (1,) * (chosen.ndim - 1)
        return jnp.where(mask.reshape(shape), chosen, other)

    return jax.tree.map(choose, chosen, other)


def _noise(empty, like, std, keys) -> Cache:
    """A cache of noise after one position, so that it is not taken for a new document.

    Rings stay empty: no position says that their keys are there.
    """
    values = empty.floating()
    ends = None if like is None else like.floating()
    for index, name in enumerate(values):
        shape = values[name].shape[1:]
        leaf_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        noise = jax.vmap(lambda key, shape=shape: jax.random.normal(key, shape))(
            leaf_keys
        )
        if ends is None:
            values[name] = std * noise
        else:
            end = ends[name].astype(jnp.float32)
            values[name] = jnp.mean(end) + jnp.std(end) * noise
    next_position = jnp.ones_like(empty.next_position)
    return dataclasses.replace(empty.with_floating(values), next_position=next_position)
