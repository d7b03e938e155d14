"""What rows begin with in training, against plain reading."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from recurrentgemma import cache as cache_lib
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.training.data import Batch
from recurrentgemma.training.rows import (
    INITIAL_STATES,
    RowsConfig,
    continued_positions,
    init_rows,
    reading,
)
from recurrentgemma.training.state import Checkpoints, TrainState
from recurrentgemma.training.step import batch_sums, make_train_step
from tests.models import random_model, random_tokens, tiny_config
from tests.tolerances import assert_close

ROWS, LENGTH = 3, 6


@pytest.fixture(scope="module")
def model():
    config = tiny_config(num_layers=2, block_pattern=PATTERN, mlp_width=0)
    return random_model(config)


PATTERN = ("min_gru", "local_attention")
TOKENS = np.asarray(random_tokens((ROWS, 2 * LENGTH + 1)))


def batch_of(start=0, positions=None):
    """LENGTH tokens of each row from `start` on; documents that began at 0."""
    places = np.tile(np.arange(start, start + LENGTH, dtype=np.int32), (ROWS, 1))
    return Batch(
        tokens=TOKENS[:, start : start + LENGTH],
        positions=places if positions is None else np.array(positions, np.int32),
        targets=TOKENS[:, start + 1 : start + LENGTH + 1],
        mask=np.ones((ROWS, LENGTH), np.float32),
    )


sums_of = jax.jit(batch_sums)


def reader(name):
    return jax.jit(reading(RowsConfig(initial_state=name), batch_sums))


def test_positions_go_on_after_a_state():
    positions = jnp.array([[0, 1, 2, 0, 1], [-1, 7, -1, 8, 0], [-1] * 5])
    continued = continued_positions(positions, jnp.array([5, 3, 9]))
    expected = [[5, 6, 7, 0, 1], [-1, 3, -1, 4, 0], [-1] * 5]
    np.testing.assert_array_equal(continued, expected)


def test_carried_rows_read_on_and_others_begin_anew(model):
    """The last row's batch goes on elsewhere: it begins with nothing."""
    read = reader("carried")
    rows = init_rows(RowsConfig(initial_state="carried"), model, ROWS)
    _, rows = read(model, batch_of(), rows)
    positions = np.tile(np.arange(LENGTH, 2 * LENGTH), (ROWS, 1))
    positions[2] += 40
    batch = batch_of(LENGTH, positions)
    sums, after = read(model, batch, rows)
    _, cache = sums_of(model, batch_of())
    empty = model.init_cache(ROWS)
    start = cache_lib.concatenate(
        [cache_lib.take(cache, [0, 1]), cache_lib.take(empty, [2])]
    )
    expected, expected_cache = sums_of(model, batch, start)
    assert_close(sums["loss"] / 18, expected["loss"] / 18, "loss")
    np.testing.assert_array_equal(after.cache.next_position, [12, 12, 52])
    for name, leaf in expected_cache.floating().items():
        assert_close(after.cache.floating()[name], leaf, "cache")


def test_passed_rows_begin_with_the_state_after_another_row(model):
    rows = init_rows(RowsConfig(initial_state="passed"), model, ROWS)
    _, cache = sums_of(model, batch_of())
    sums, after = reader("passed")(model, batch_of(), rows._replace(cache=cache))
    going_on = np.tile(np.arange(LENGTH, 2 * LENGTH), (ROWS, 1))
    other = cache_lib.take(cache, [2, 0, 1])
    expected, _ = sums_of(model, batch_of(0, going_on), other)
    assert_close(sums["loss"] / 18, expected["loss"] / 18, "loss")
    np.testing.assert_array_equal(after.step, 1)
    np.testing.assert_array_equal(after.cache.next_position, [12] * 3)


def test_noise_changes_from_step_to_step_and_reaches_the_loss(model):
    read = reader("noise")
    rows = init_rows(RowsConfig(initial_state="noise"), model, ROWS)
    losses = []
    for step in (0, 1, 0):
        sums, _ = read(model, batch_of(), rows._replace(step=rows.step + step))
        losses.append(float(sums["loss"]))
    assert losses[0] == losses[2] != losses[1]
    assert abs(losses[0] - float(sums_of(model, batch_of())[0]["loss"])) > 1e-2


def test_the_noise_of_a_row_does_not_depend_on_its_batch(model):
    config = RowsConfig(initial_state="noise")
    read = reading(config, lambda model, batch, cache: ({}, cache))
    rows = init_rows(config, model, ROWS)
    _, together = read(model, batch_of(), rows)
    _, alone = read(model, *jax.tree.map(lambda x: x[2:], (batch_of(), rows)))
    for name, leaf in alone.cache.floating().items():
        np.testing.assert_array_equal(leaf, together.cache.floating()[name][2:])
    h = together.cache.floating()["layers.0"]
    assert (h[0] != h[1]).all() and abs(h.std() - 1) < 0.3


def test_fitted_noise_has_the_moments_of_the_last_states(model, monkeypatch):
    """The first step has seen no states: it begins like zero."""
    config = RowsConfig(initial_state="fitted_noise")
    begun = []

    def watch(model, batch, cache):
        begun.append(cache)
        return {}, cache

    read = reading(config, watch)
    rows = init_rows(config, model, 64)
    many = jax.tree.map(lambda x: np.resize(x, (64, LENGTH)), batch_of())
    read(model, many, rows)
    np.testing.assert_array_equal(begun[0].floating()["layers.0"], 0)
    values = {n: x + 3 for n, x in rows.cache.floating().items()}
    values["layers.0"] += 2 * jax.random.normal(jax.random.key(1), (64, 32))
    read(model, many, rows._replace(cache=rows.cache.with_floating(values)))
    h = begun[1].floating()["layers.0"]
    assert abs(h.mean() - 3) < 0.2 and abs(h.std() - 2) < 0.2
    np.testing.assert_array_equal(begun[1].floating()["layers.1.keys"], 3)
    np.testing.assert_array_equal(begun[1].next_position, 1)
    np.testing.assert_array_equal(begun[1].layers[1].positions, -1)


def test_a_train_step_hands_its_rows_on(model):
    """In chunks too; what is handed on has no gradient."""
    config = RowsConfig(initial_state="carried", chunk_tokens=4)
    optimizer = optax.sgd(0.1)
    params = jax.tree.map(jnp.copy, named_parameters(model))
    rows = init_rows(config, model, ROWS)
    state = TrainState(params, optimizer.init(params), jnp.int32(0), rows)
    step = make_train_step(model, optimizer, rows=config)
    state, metrics = step(state, {}, batch_of())
    expected = sums_of(model, batch_of())[0]["loss"] / 18
    assert_close(metrics["loss"], expected, "loss")
    state, metrics = step(state, {}, batch_of(LENGTH))
    np.testing.assert_array_equal(state.rows.cache.next_position, [12] * 3)
    np.testing.assert_array_equal(state.rows.step, 2)
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("name", INITIAL_STATES[1:])
def test_a_growing_cache_is_not_handed_on(name):
    model = random_model(tiny_config(block_pattern=("global_attention",), num_layers=1))
    with pytest.raises(ValueError, match="initial_state: expected zero"):
        init_rows(RowsConfig(initial_state=name), model, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"initial_state": "one"},
        {"noise_std": 0.0},
        {"chunk_tokens": -1},
        {"state_every": 0},
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: expected"):
        RowsConfig(**fields)


def test_rows_are_saved_and_restored_with_the_training_state(model, tmp_path):
    config = RowsConfig(initial_state="carried")
    _, rows = reader("carried")(model, batch_of(), init_rows(config, model, ROWS))
    params = {"a": jnp.ones(3)}
    state = TrainState(params, optax.sgd(0.1).init(params), jnp.int32(4), rows)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    checkpoints.close()
    chex.assert_trees_all_equal(restored, state)
