"""One step of training, and one batch of evaluation, as jitted functions.

The model that is passed in is a template: its structure and how it runs are used. Its
parameters are those of the state, which are trained, and those that are frozen.

Metrics are dictionaries from here to the log: `batch_sums` is the place to add one that
is a mean over counted tokens, in training and in evaluation, and `make_train_step` the
place for any other.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recurrentgemma.cache import Cache
from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels import meshes
from recurrentgemma.training.data import Batch
from recurrentgemma.training.guard import GuardState, choose
from recurrentgemma.training.losses import token_losses
from recurrentgemma.training.rows import RowsConfig, reading
from recurrentgemma.training.sharding import keep_shardings
from recurrentgemma.training.state import Parameters, TrainState, with_parameters

Metrics = dict[str, jax.Array]
"""Scalars by name."""
TOKENS = "tokens"
"""The number of counted targets in the sums of a batch."""
OBJECTIVE = "objective"
"""What is minimised, where it is more than the loss."""
BY_POSITION = "by_position"
"""Sums by position, [2, POSITION_RANGES]: nats, and counted targets. The position is the
number of tokens of its document that the model has read before a token: of a row that
begins inside a document, those of the row. Range i is from 2^i - 1 to 2^(i + 1) - 2."""
POSITION_RANGES = 32


def whole_rows(tokens: Any) -> Batch:
    """A batch whose rows are a document each; the loss is of every next token.

    Args:
      tokens: int32 [B, T + 1].
    """
    batch_size, length = np.shape(tokens)
    positions = np.tile(np.arange(length - 1, dtype=np.int32), (batch_size, 1))
    mask = np.ones_like(positions, np.float32)
    return Batch(tokens[:, :-1], positions, tokens[:, 1:], mask)


def batch_sums(
    model: Griffin, batch: Batch, cache: Cache | None = None, *, z_weight: float = 0.0
) -> tuple[Metrics, Cache]:
    """Sums over the counted targets of a batch.

    Args:
      model: what predicts.
      batch: its arrays are [B, T].
      cache: what the B rows have read before; None is nothing.
      z_weight: weight of the z-loss in the `objective`.

    Returns:
      float32 sums: `loss` in nats, the number of counted `tokens`, `by_position`, and
      with a z-loss the `objective`; and the cache of the rows after the batch.
    """
    chex.assert_rank(batch.tokens, 2)
    chex.assert_equal_shape(batch)
    from_nothing = cache is None
    hidden, cache = model(batch.tokens, batch.positions, cache)
    found = token_losses(model, hidden, batch.targets, batch.mask, z_weight=z_weight)
    nats = found.nats * batch.mask
    sums = {
        "loss": found.objective,
        TOKENS: jnp.sum(batch.mask),
        BY_POSITION: _by_position(nats, batch, from_nothing=from_nothing),
    }
    if z_weight:
        sums |= {"loss": jnp.sum(nats), OBJECTIVE: found.objective}
    return sums, cache


def _by_position(nats: jax.Array, batch: Batch, *, from_nothing: bool) -> jax.Array:
    read = jnp.asarray(batch.positions)
    if from_nothing:
        read = jnp.minimum(read, jnp.arange(read.shape[1])[None])
    number = jnp.maximum(read, 0).astype(jnp.uint32) + 1
    ranges = (31 - jax.lax.clz(number)).astype(jnp.int32).reshape(-1)
    values = jnp.stack([nats.reshape(-1), jnp.asarray(batch.mask).reshape(-1)])
    zeros = jnp.zeros((2, POSITION_RANGES), jnp.float32)
    return zeros.at[:, ranges].add(values)


def mean_metrics(sums: Metrics, tokens: jax.Array | None = None) -> Metrics:
    """Means over the counted targets, from their sums; 0 if none counts.

    Args:
      sums: those of `batch_sums`, or their totals; what is no scalar is left out.
      tokens: how many targets count, if other than those of the sums.
    """
    count = jnp.maximum(sums[TOKENS] if tokens is None else tokens, 1)
    others = (TOKENS, BY_POSITION)
    return {name: sums[name] / count for name in sums if name not in others}


def add_up(batches: Iterable[Metrics]) -> dict[str, Any]:
    """Totals of the sums of several batches, in float64."""
    return jax.tree.map(
        lambda *sums: np.sum(np.asarray(sums, np.float64), axis=0), *batches
    )


def means(batches: Iterable[Metrics]) -> dict[str, float]:
    """Means over the counted targets of several batches, from the sums of each."""
    return {name: float(x) for name, x in mean_metrics(add_up(batches)).items()}


def loss_by_position(totals: Mapping[str, Any]) -> dict[str, float]:
    """Mean nats by position (see `BY_POSITION`).

    Args:
      totals: as `add_up` returns them.

    Returns:
      Means by the range's first position; ranges without a target are left out.
    """
    nats, counts = np.asarray(totals[BY_POSITION])
    return {
        str(2**i - 1): float(nats[i] / counts[i])
        for i in range(POSITION_RANGES)
        if counts[i]
    }


def mean_loss(model: Griffin, batch: Batch) -> jax.Array:
    """Mean nats of a counted target; 0 if none counts."""
    sums, _ = batch_sums(model, batch)
    return mean_metrics(sums)["loss"]


def make_train_step(
    model: Griffin,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule | None = None,
    *,
    rows: RowsConfig = RowsConfig(),
    seed: int = 0,
    accumulation: int = 1,
    z_weight: float = 0.0,
) -> Callable[[TrainState, Parameters, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, frozen, batch) -> (state, metrics).

    The state that goes in is used up. `frozen` are the parameters of the model that the
    state does not have, {} if it has all.

    Metrics are float32 scalars: those of `mean_metrics`, `gradient_norm` before the
    clip, `learning_rate` if its schedule is given, and `skipped` (0 or 1) with an
    optimizer that is `guarded`.

    Args:
      model: the template.
      optimizer: of the trained parameters; its state is the state's.
      learning_rate: schedule, for the metrics alone.
      rows: how rows are read. What they are handed from step to step is `state.rows`,
          from `init_rows`.
      seed: seed of the noise that rows may begin with.
      accumulation: number of parts of a batch whose gradients are added up, one after
          the other; each has as many rows. The mean is over the whole batch.
      z_weight: weight of the z-loss.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    options = {"z_weight": z_weight} if z_weight else {}
    read = reading(rows, partial(batch_sums, **options), seed)

    def loss_of(params, frozen, batch, carried, tokens):
        whole = with_parameters(model, params | frozen)
        sums, carried = read(whole, batch, carried)
        metrics = mean_metrics(sums, tokens)
        return metrics.get(OBJECTIVE, metrics["loss"]), (metrics, carried)

    def gradients_of(params, frozen, batch, carried):
        tokens = jnp.sum(batch.mask)
        gradient = jax.grad(loss_of, has_aux=True)
        if accumulation == 1:
            return gradient(params, frozen, batch, carried, tokens)

        def add_part(total, part):
            gradients, (metrics, carried) = gradient(params, frozen, *part, tokens)
            return jax.tree.map(jnp.add, total, (gradients, metrics)), carried

        split = partial(_interleaved, parts=accumulation)
        parts = jax.tree.map(split, (batch, carried))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes, (metrics, _) = jax.eval_shape(gradient, params, frozen, *first, tokens)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes, metrics))
        (gradients, metrics), carried = jax.lax.scan(add_part, zeros, parts)
        return gradients, (metrics, jax.tree.map(_joined, carried))

    def train_step(state: TrainState, frozen: Parameters, batch: Batch):
        gradients, (metrics, carried) = gradients_of(
            state.params, frozen, batch, state.rows
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, state.params)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        updates, optimizer_state = optimizer.update(
            gradients,
            state.optimizer_state,
            state.params,
            loss=metrics["loss"],
            gradient_norm=metrics["gradient_norm"],
        )
        params: Any = optax.apply_updates(state.params, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(params, state.params)
        carried, scheduled = None if state.rows is None else carried, state.step
        if isinstance(optimizer_state, GuardState):
            before = state.optimizer_state.skipped
            good = optimizer_state.skipped == before
            metrics["skipped"] = 1.0 - good.astype(jnp.float32)
            carried = choose(good, carried, state.rows)
            scheduled = scheduled - before
        if learning_rate is not None:
            metrics["learning_rate"] = jnp.asarray(learning_rate(scheduled))
        return TrainState(params, optimizer_state, state.step + 1, carried), metrics

    return jax.jit(keep_shardings(train_step), donate_argnums=0)


def _interleaved(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]; each part has rows of every device."""
    return jnp.moveaxis(jnp.reshape(x, (-1, parts, *x.shape[1:])), 1, 0)


def _joined(x: jax.Array) -> jax.Array:
    """The inverse of `_interleaved`."""
    return jnp.reshape(jnp.moveaxis(x, 0, 1), (-1, *x.shape[2:]))


def make_evaluation_step(model: Griffin) -> Callable[[Parameters, Batch], Metrics]:
    """A jitted (params, batch) -> the sums of `batch_sums`; params are all of them."""

    @meshes.as_program
    def evaluation_step(params: Parameters, batch: Batch) -> Metrics:
        return batch_sums(with_parameters(model, params), batch)[0]

    return jax.jit(evaluation_step)
