"""One step of training, and one batch of evaluation, as jitted functions.

The model that is passed in is a template: its structure and how it runs are used, its
parameters are those of the state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from recurrentgemma.griffin import Griffin
from recurrentgemma.training.data import Batch
from recurrentgemma.training.losses import cross_entropy
from recurrentgemma.training.state import TrainState, with_parameters

Metrics = dict[str, jax.Array]


def batch_loss(model: Griffin, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum of nats over counted targets, and their count; float32 scalars."""
    hidden, _ = model(batch.tokens, batch.positions)
    total = cross_entropy(model, hidden, batch.targets, batch.mask)
    return total, jnp.sum(batch.mask)


def mean_loss(model: Griffin, batch: Batch) -> jax.Array:
    """Mean nats a counted target; 0 if none counts."""
    total, count = batch_loss(model, batch)
    return total / jnp.maximum(count, 1)


def make_train_step(
    model: Griffin, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, batch) -> (state, metrics); the state that goes in is used up.

    Metrics are float32 scalars: `loss` in nats a token, `gradient_norm` before the clip.
    """

    def loss_of(params, batch):
        return mean_loss(with_parameters(model, params), batch)

    def train_step(state: TrainState, batch: Batch):
        loss, gradients = jax.value_and_grad(loss_of)(state.params, batch)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer_state, state.params
        )
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.global_norm(gradients)}
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_evaluation_step(
    model: Griffin,
) -> Callable[[dict[str, jax.Array], Batch], tuple[jax.Array, jax.Array]]:
    """A jitted (params, batch) -> (sum of nats, counted targets)."""
    return jax.jit(
        lambda params, batch: batch_loss(with_parameters(model, params), batch)
    )
