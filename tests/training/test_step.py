"""The train step: frozen parameters, rows that go on, parts of a batch, bad steps."""

import runpy
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import recurrentgemma
from recurrentgemma import Runtime, load, save, training
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.griffin import stack_layers
from recurrentgemma.training import guard
from recurrentgemma.training.guard import GuardConfig, guarded
from recurrentgemma.training.state import new_state, with_parameters
from recurrentgemma.training.step import (
    BY_POSITION,
    add_up,
    batch_sums,
    loss_by_position,
    make_train_step,
    mean_loss,
    whole_rows,
)
from tests.models import random_model, random_tokens, tiny_config
from tests.tolerances import assert_close

CONFIG = tiny_config(num_layers=2, block_pattern=("recurrent", "local_attention"))
LENGTH = 8


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def batch_of(tokens, start=0):
    """Rows [B, T + 1] of documents whose first token here has position `start`."""
    batch = whole_rows(tokens)
    return batch._replace(
        mask=jnp.asarray(batch.mask), positions=batch.positions + start
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
    # 8 to 14 tokens were read before the first seven targets, 15 before the last.
    counts = {3: 2 * 7, 4: 2 * 1}
    assert {i: n for i, n in enumerate(sums[BY_POSITION][1]) if n} == counts
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


def test_losses_by_position(model, plain):
    """Rows that begin inside a document have read nothing of it before."""
    tokens = random_tokens((2, LENGTH + 1))
    batch = batch_of(tokens, start=jnp.array([[0], [5]]))
    batch = batch._replace(mask=batch.mask.at[0, 6].set(0.0))
    sums = add_up([jax.jit(batch_sums)(model, batch)[0]])
    hidden, _ = model(batch.tokens, batch.positions)
    log_p = jax.nn.log_softmax(model.logits(hidden))
    nats = -np.take_along_axis(np.asarray(log_p), batch.targets[..., None], 2)[..., 0]
    counted = np.asarray(batch.mask) > 0
    found = loss_by_position(sums)
    assert list(found) == ["0", "1", "3", "7"]
    for first, last in ((0, 0), (1, 2), (3, 6), (7, 7)):
        part = (slice(None), slice(first, last + 1))
        expected = nats[part][counted[part]].mean()
        np.testing.assert_allclose(found[str(first)], expected, rtol=1e-5)


@pytest.mark.slow
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


def test_the_loop_of_the_readme_runs_as_it_is_written(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("A loop of your own:")[1].split("```")[1]
    code = code.removeprefix("python\n")
    lines = [line for line in code.splitlines() if line and "import" not in line]
    assert len(lines) <= 10
    module = training.__doc__ or ""
    assert all(line.strip() in module for line in code.splitlines())
    # The model of that name is a small one here.
    save(tmp_path / "small", random_model(CONFIG), None)
    monkeypatch.setattr(
        recurrentgemma,
        "load",
        lambda name, **settings: load({"nano": tmp_path / "small"}[name], **settings),
    )
    monkeypatch.chdir(tmp_path)
    tokens = np.asarray(random_tokens((2, LENGTH + 1)))
    (tmp_path / "loop.py").write_text(code)
    names = runpy.run_path("loop.py", {"batches": [tokens] * 3})
    before, _ = load(tmp_path / "small")
    after, _ = load("tuned")
    loss = jax.jit(mean_loss)
    batch = whole_rows(tokens)
    assert loss(after, batch) < loss(before, batch)
    assert float(names["metrics"]["loss"]) < loss(before, batch)
