"""The train step: frozen parameters, and rows that go on from step to step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.training.data import Batch
from recurrentgemma.training.state import TrainState
from recurrentgemma.training.step import batch_sums, make_train_step
from tests.models import random_model, random_tokens, tiny_config

CONFIG = tiny_config()
LENGTH = 8


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def batch_of(tokens, start=0):
    """Rows [B, T + 1] as inputs and targets of documents that begin before `start`."""
    length = tokens.shape[1] - 1
    positions = start + jnp.arange(length, dtype=jnp.int32)
    return Batch(
        tokens=tokens[:, :-1],
        positions=jnp.broadcast_to(positions, (len(tokens), length)),
        targets=tokens[:, 1:],
        mask=jnp.ones((len(tokens), length)),
    )


def new_state(params, optimizer, rows=None):
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), jnp.int32(0), rows)


def test_frozen_parameters_are_used_and_stay(model):
    optimizer = optax.sgd(0.1)
    params = named_parameters(model)
    trained = {name: leaf for name, leaf in params.items() if "mlp" in name}
    frozen = {name: params[name] for name in params.keys() - trained.keys()}
    step = make_train_step(model, optimizer)
    batch = batch_of(random_tokens((2, LENGTH + 1)))
    part, metrics = step(new_state(trained, optimizer), frozen, batch)
    whole, all_metrics = step(new_state(params, optimizer), {}, batch)
    assert part.params.keys() == trained.keys()
    np.testing.assert_allclose(metrics["loss"], all_metrics["loss"], rtol=1e-6)
    for name, value in part.params.items():
        np.testing.assert_allclose(value, whole.params[name], rtol=1e-4, atol=1e-6)
        assert (np.asarray(value) != params[name]).any()


def test_rows_go_on_where_the_last_step_ended(model):
    tokens = random_tokens((2, 2 * LENGTH + 1))
    optimizer = optax.sgd(0.0)
    state = new_state(named_parameters(model), optimizer, model.init_cache(2))
    step = make_train_step(model, optimizer)
    first = batch_of(tokens[:, : LENGTH + 1])
    second = batch_of(tokens[:, LENGTH:], start=LENGTH)
    state, _ = step(state, {}, first)
    state, metrics = step(state, {}, second)
    (_, cache) = jax.jit(batch_sums)(model, first)
    expected, cache = jax.jit(batch_sums)(model, second, cache)
    np.testing.assert_allclose(
        metrics["loss"], expected["loss"] / expected["tokens"], rtol=1e-5
    )
    chex.assert_trees_all_close(state.rows, cache, atol=1e-4)
