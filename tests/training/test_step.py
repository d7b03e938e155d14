"""The train step: frozen parameters, rows that go on, parts of a batch, bad steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recurrentgemma import Runtime
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.griffin import stack_layers
from recurrentgemma.training import guard
from recurrentgemma.training.data import Batch
from recurrentgemma.training.guard import GuardConfig, guarded
from recurrentgemma.training.state import new_state, with_parameters
from recurrentgemma.training.step import batch_sums, make_train_step
from tests.models import random_model, random_tokens, tiny_config
from tests.tolerances import assert_close

CONFIG = tiny_config(num_layers=2, block_pattern=("recurrent", "local_attention"))
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


@pytest.fixture(scope="module")
def plain(model):
    """A batch, and the state and the metrics after a plain step with it."""
    optimizer = optax.sgd(0.1)
    batch = batch_of(random_tokens((2, LENGTH + 1)))
    state = new_state(named_parameters(model), optimizer)
    return batch, *make_train_step(model, optimizer)(state, {}, batch)


def test_frozen_parameters_are_used_and_stay(model, plain):
    optimizer = optax.sgd(0.1)
    params = named_parameters(model)
    batch, whole, all_metrics = plain
    trained = {name: leaf for name, leaf in params.items() if "mlp" in name}
    frozen = {name: params[name] for name in params.keys() - trained.keys()}
    step = make_train_step(model, optimizer)
    part, metrics = step(new_state(trained, optimizer), frozen, batch)
    assert part.params.keys() == trained.keys()
    np.testing.assert_allclose(metrics["loss"], all_metrics["loss"], rtol=1e-6)
    for name, value in part.params.items():
        np.testing.assert_allclose(value, whole.params[name], rtol=1e-4, atol=1e-6)
        assert (np.asarray(value) != params[name]).any()


def test_rows_go_on_where_the_last_step_that_counted_ended(model):
    tokens = random_tokens((2, 2 * LENGTH + 1))
    first = batch_of(tokens[:, : LENGTH + 1])
    second = batch_of(tokens[:, LENGTH:], start=LENGTH)
    optimizer = guarded(optax.sgd(0.1))
    params, rows = named_parameters(model), model.init_cache(2)
    step = make_train_step(model, optimizer, lambda step: 1.0 * step)
    broken = first._replace(mask=first.mask * jnp.nan)
    state, metrics = step(new_state(params, optimizer, rows), {}, broken)
    assert metrics["skipped"] == 1 and int(state.step) == 1
    chex.assert_trees_all_equal((state.params, state.rows), (params, rows))
    state, metrics = step(state, {}, first)
    assert (metrics["skipped"], metrics["learning_rate"]) == (0, 0)
    between = jax.tree.map(jnp.copy, state)
    state, metrics = step(state, {}, second)
    assert metrics["learning_rate"] == 1
    _, cache = model(first.tokens, first.positions)
    chex.assert_trees_all_close(between.rows, cache, atol=1e-4)
    trained = with_parameters(model, between.params)
    sums, cache = jax.jit(batch_sums)(trained, second, between.rows)
    np.testing.assert_allclose(
        metrics["loss"], sums["loss"] / sums["tokens"], rtol=1e-5
    )
    chex.assert_trees_all_close(state.rows, cache, atol=1e-4)


def test_parts_of_a_batch_add_up_to_the_whole(model):
    optimizer = guarded(optax.sgd(0.1))
    batch = batch_of(random_tokens((4, LENGTH + 1)))
    batch = batch._replace(mask=batch.mask.at[0].set(0.0))  # parts count differently
    params, found = named_parameters(model), []
    for accumulation in (1, 2):
        step = make_train_step(
            model, optimizer, accumulation=accumulation, z_weight=1e-2
        )
        state = new_state(params, optimizer, model.init_cache(4))
        found.append(step(state, {}, batch))
    (whole, metrics), (parts, metrics_of_parts) = found
    assert metrics["objective"] > metrics["loss"]
    for name, value in metrics.items():
        np.testing.assert_allclose(value, metrics_of_parts[name], rtol=1e-5)
    chex.assert_trees_all_close(whole.params, parts.params, atol=1e-6)
    chex.assert_trees_all_close(whole.rows, parts.rows, atol=1e-5)


@pytest.mark.parametrize("loss", [np.nan, np.inf, 50.0])
def test_a_bad_step_changes_nothing(loss):
    params = {"x": jnp.ones([2])}
    optimizer = guarded(optax.adam(0.1), GuardConfig(spike_ratio=3.0))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    gradient = {"x": jnp.full([2], 0.5)}
    for _ in range(guard.FIRST_STEPS):
        updates, state = update(gradient, state, params, loss=10.0, gradient_norm=1.0)
        assert (updates["x"] != 0).all()
    bad = {"x": jnp.full([2], loss)}
    updates, after = update(bad, state, params, loss=loss, gradient_norm=loss)
    np.testing.assert_array_equal(updates["x"], 0)
    assert (int(after.counted), int(after.skipped)) == (guard.FIRST_STEPS, 1)
    chex.assert_trees_all_equal(after._replace(skipped=state.skipped), state)
    updates, _ = update(gradient, after, params, loss=29.0, gradient_norm=1.0)
    assert (updates["x"] != 0).all()


def test_stacked_layers_and_bfloat16_are_ways_to_run(plain):
    """Float32 parameters and gradients; the same loss."""
    batch, _, metrics = plain
    optimizer = optax.sgd(0.1)
    runtime = Runtime(compute_dtype="bfloat16", remat=True)
    model = stack_layers(random_model(CONFIG, runtime=runtime))
    state = new_state(named_parameters(model), optimizer)
    state, found = make_train_step(model, optimizer)(state, {}, batch)
    assert_close(found["loss"], metrics["loss"], "loss", "bfloat16")
    assert {leaf.dtype.name for leaf in state.params.values()} == {"float32"}
