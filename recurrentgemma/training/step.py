"""One step of training, and one batch of evaluation, as jitted functions.

The model that is passed in is a template: its structure and how it runs are used. Its
parameters are those of the state, which are trained, and those that are frozen.

Metrics are dictionaries from here to the log: `batch_sums` is the place to add one that
is a mean over counted tokens, in training and in evaluation, and `make_train_step` the
place for any other.
"""

from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from recurrentgemma.cache import Cache
from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels import meshes
from recurrentgemma.training.data import Batch
from recurrentgemma.training.losses import cross_entropy
from recurrentgemma.training.sharding import keep_shardings
from recurrentgemma.training.state import Parameters, TrainState, with_parameters

Metrics = dict[str, jax.Array]
"""Scalars by name."""
TOKENS = "tokens"
"""The number of counted targets in the sums of a batch."""


def batch_sums(
    model: Griffin, batch: Batch, cache: Cache | None = None
) -> tuple[Metrics, Cache]:
    """Sums over the counted targets of a batch.

    Args:
        model: what predicts.
        batch: its arrays are [B, T].
        cache: what the B rows have read before; None is nothing.

    Returns:
        float32 scalars, `loss` in nats and the number of counted `tokens`; and the
        cache of the rows after the batch.
    """
    chex.assert_rank(batch.tokens, 2)
    chex.assert_equal_shape(batch)
    hidden, cache = model(batch.tokens, batch.positions, cache)
    sums = {
        "loss": cross_entropy(model, hidden, batch.targets, batch.mask),
        TOKENS: jnp.sum(batch.mask),
    }
    return sums, cache


def mean_metrics(sums: Metrics) -> Metrics:
    """Means over the counted targets, from their sums; 0 if none counts."""
    count = jnp.maximum(sums[TOKENS], 1)
    return {name: sums[name] / count for name in sums if name != TOKENS}


def means(batches: Iterable[Metrics]) -> dict[str, float]:
    """Means over the counted targets of several batches, from the sums of each."""
    total = jax.tree.map(lambda *sums: sum(map(float, sums)), *batches)
    return {name: float(value) for name, value in mean_metrics(total).items()}


def mean_loss(model: Griffin, batch: Batch) -> jax.Array:
    """Mean nats of a counted target; 0 if none counts."""
    sums, _ = batch_sums(model, batch)
    return mean_metrics(sums)["loss"]


def make_train_step(
    model: Griffin,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule | None = None,
) -> Callable[[TrainState, Parameters, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, frozen, batch) -> (state, metrics).

    The state that goes in is used up. `frozen` are the parameters of the model that the
    state does not have, {} if it has all. Rows of the state that carry a cache begin
    with it, and carry the cache after the batch, without gradient, to the next step.

    Metrics are float32 scalars: those of `mean_metrics`, `gradient_norm` before the
    clip, and `learning_rate` if its schedule is given.
    """

    def loss_of(params, frozen, batch, rows):
        sums, cache = batch_sums(with_parameters(model, params | frozen), batch, rows)
        metrics = mean_metrics(sums)
        return metrics["loss"], (metrics, cache)

    def train_step(state: TrainState, frozen: Parameters, batch: Batch):
        gradients, (metrics, cache) = jax.grad(loss_of, has_aux=True)(
            state.params, frozen, batch, state.rows
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, state.params)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer_state, state.params
        )
        params: Any = optax.apply_updates(state.params, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(params, state.params)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        if learning_rate is not None:
            metrics["learning_rate"] = jnp.asarray(learning_rate(state.step))
        rows = None if state.rows is None else cache
        return TrainState(params, optimizer_state, state.step + 1, rows), metrics

    return jax.jit(keep_shardings(train_step), donate_argnums=0)


def make_evaluation_step(model: Griffin) -> Callable[[Parameters, Batch], Metrics]:
    """A jitted (params, batch) -> the sums of `batch_sums`; params are all of them."""

    @meshes.as_program
    def evaluation_step(params: Parameters, batch: Batch) -> Metrics:
        return batch_sums(with_parameters(model, params), batch)[0]

    return jax.jit(evaluation_step)
