"""What is decayed, and the schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.training.optimizer import (
    OptimizerConfig,
    is_decayed,
    learning_rate_schedule,
    make_optimizer,
)
from tests.models import random_model, tiny_config


def test_only_matrices_outside_the_recurrence_are_decayed():
    params = named_parameters(random_model(tiny_config()))
    decayed = {
        ".".join(name.split(".")[2:])
        for name in params
        if is_decayed(name, tiny_config())
    }
    assert decayed == {
        *(f"mixer.{name}.kernel" for name in ("linear_x", "linear_y", "linear_out")),
        *(f"mixer.proj_{name}.kernel" for name in ("q", "k", "v", "out")),
        *(f"mlp.{name}.kernel" for name in ("gate", "up", "down")),
    }


def test_a_step_without_gradient_moves_decayed_parameters_alone():
    params = {
        "blocks.0.mlp.up.kernel": jnp.ones([2, 2]),
        "blocks.0.mixer.rg_lru.a_param": jnp.ones([2]),
        "embedder.embedding": jnp.ones([2, 2]),
    }
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.1, warmup_steps=0)
    optimizer = make_optimizer(config, 10, tiny_config())
    zeros = {name: 0 * value for name, value in params.items()}
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    updates, state = update(zeros, state, params)
    updates, _ = update(zeros, state, params)
    moved = {name for name, update in updates.items() if (update != 0).any()}
    assert moved == {"blocks.0.mlp.up.kernel"}


def test_schedule_rises_then_falls():
    config = OptimizerConfig(
        learning_rate=1e-2, warmup_steps=10, final_learning_rate_ratio=0.1
    )
    rates = jax.jit(learning_rate_schedule(config, 200))(jnp.arange(201)).tolist()
    assert 0 < rates[0] < rates[5] < rates[10] == pytest.approx(1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3)


def test_warm_up_stable_decay():
    config = OptimizerConfig(
        learning_rate=1e-2,
        schedule="wsd",
        warmup_steps=4,
        cooldown_steps=20,
        final_learning_rate_ratio=0.1,
    )
    rates = jax.jit(learning_rate_schedule(config, 100))(jnp.arange(101)).tolist()
    assert rates[:4] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3])
    assert rates[4:81] == pytest.approx([1e-2] * 77)
    assert rates[85] == pytest.approx(1e-2 * (1 - 0.9 * 0.5))
    assert rates[100] == pytest.approx(1e-3)
    whole = dataclasses.replace(config, cooldown_steps=None)
    fifth = jax.jit(learning_rate_schedule(whole, 100))(jnp.arange(101)).tolist()
    assert fifth == rates


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 0},
        {"b2": 1.0},
        {"weight_decay": -1},
        {"clip_norm": -1.0},
        {"schedule": "linear"},
        {"cooldown_steps": -1},
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        OptimizerConfig(**fields)
