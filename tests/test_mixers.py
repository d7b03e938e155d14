"""A user's own mixer is trained, sampled, saved and loaded, and no file knows of it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import Sampler, Sampling, cost, load, save
from recurrentgemma import cache as cache_lib
from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.checkpoints import named_parameters, parameter_dtype
from recurrentgemma.config import Runtime
from recurrentgemma.training.data import Batch
from recurrentgemma.training.optimizer import (
    OptimizerConfig,
    is_decayed,
    make_optimizer,
)
from recurrentgemma.training.state import TrainState
from recurrentgemma.training.step import make_train_step
from tests import own_mixer
from tests.models import forward, random_model, random_tokens, tiny_config

FRESH = """
import numpy as np, sys
if sys.argv[3] == "registered":
    from tests.own_mixer import register
    register()
from recurrentgemma import load
from recurrentgemma.checkpoints import named_parameters
model, _ = load(sys.argv[1])
np.savez(sys.argv[2], **named_parameters(model))
"""


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(TEMPORAL_MIXERS, own_mixer.NAME, own_mixer.MovingAverage)
    return tiny_config(
        block_pattern=(own_mixer.NAME, "local_attention"), num_layers=2, vocab_size=40
    )


def test_it_trains(config):
    model = random_model(config)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 8, config)
    params = jax.tree.map(jnp.copy, named_parameters(model))
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    tokens = random_tokens((2, 9))
    positions = jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1))
    batch = Batch(tokens[:, :-1], positions, tokens[:, 1:], jnp.ones((2, 8)))
    step, losses = make_train_step(model, optimizer), []
    for _ in range(8):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    name = "blocks.0.mixer.decay_logits"
    assert (np.asarray(state.params[name]) != named_parameters(model)[name]).any()


def test_it_is_sampled_and_cannot_be_rewound(config):
    model = random_model(config)
    prompt = [5, 6, 7]
    [sample] = Sampler(model, compile_ahead=False)(
        [prompt], max_new_tokens=6, sampling=Sampling(0), end_tokens=[]
    )
    ids = jnp.array([[*prompt, *sample.tokens]])
    logits, cache = forward(model, ids)
    chosen = np.asarray(logits[0]).argmax(-1)[len(prompt) - 1 : -1]
    assert sample.tokens == chosen.tolist()
    with pytest.raises(ValueError, match="got MovingAverage; give its class"):
        cache_lib.make_rewindable(cache, config, 2)


class WithScalar(own_mixer.MovingAverage):
    """Its state has one number a row besides."""

    def __call__(self, x, chunk, state):
        h, count = (None, 0.0) if state is None else state
        y, h = super().__call__(x, chunk, h)
        return y, (h, count + chunk.lengths.astype(jnp.float32))

    def init_state(self, batch_size, capacity=None):
        return super().init_state(batch_size), jnp.zeros((batch_size,), jnp.float32)


def test_a_class_may_be_registered_again_with_another_state(config, monkeypatch):
    tokens = random_tokens((2, 5), vocab_size=config.vocab_size)
    for mixer in (own_mixer.MovingAverage, WithScalar):
        monkeypatch.setitem(TEMPORAL_MIXERS, own_mixer.NAME, mixer)
        model = random_model(config)
        _, cache = model(tokens)
        _, cache = model(tokens, cache=cache)
    np.testing.assert_array_equal(cache.layers[0][1], [10.0, 10.0])


def test_its_costs_and_parameters_are_known(config):
    names = {"linear_in.kernel": True, "linear_in.bias": False, "decay_logits": False}
    runtime = Runtime(compute_dtype="bfloat16")
    for name, is_matrix in names.items():
        name = f"blocks.0.mixer.{name}"
        dtype = "bfloat16" if is_matrix else "float32"
        assert parameter_dtype(name, config, runtime) == dtype
        assert is_decayed(name, config) == is_matrix
    width, channels = config.width, config.lru_width
    own = 2 * width * channels + channels + width + channels
    counts = cost.parameter_counts(config)
    assert counts["recurrent blocks"] == own
    model = random_model(config)
    assert sum(counts.values()) == sum(x.size for x in jax.tree.leaves(model))
    cache = model.init_cache(3)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert cost.cache_bytes(config, 3, dtype="float32") == size


def test_it_is_saved_and_loaded_in_a_fresh_process(config, tmp_path):
    model = random_model(config)
    save(tmp_path / "saved", model, None)
    arrays = {name: np.asarray(x) for name, x in named_parameters(model).items()}
    for name, array in named_parameters(load(tmp_path / "saved")[0]).items():
        np.testing.assert_array_equal(array, arrays[name])
    out = tmp_path / "arrays.npz"
    arguments = [sys.executable, "-c", FRESH, str(tmp_path / "saved"), str(out)]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for known in ("registered", "unknown"):
        done = subprocess.run(
            [*arguments, known],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if known == "registered":
            assert done.returncode == 0, done.stderr
            with np.load(out) as loaded:
                assert set(loaded) == set(arrays)
                for name, array in arrays.items():
                    np.testing.assert_array_equal(loaded[name], array)
        else:
            assert done.returncode != 0
            assert "TEMPORAL_MIXERS['moving_average'] = YourMixer" in done.stderr


def test_only_classes_are_registered():
    with pytest.raises(TypeError, match=r"TEMPORAL_MIXERS\['mine'\]: expected a class"):
        TEMPORAL_MIXERS["mine"] = 5
    with pytest.raises(TypeError, match="expected a class"):
        TEMPORAL_MIXERS["mine"] = dict
    assert "mine" not in TEMPORAL_MIXERS


@pytest.mark.parametrize("name", TEMPORAL_MIXERS)
def test_mixers_say_what_they_need(name):
    config = tiny_config(block_pattern=(name,), num_layers=1)
    mixer = TEMPORAL_MIXERS[name]
    state = jax.eval_shape(lambda: mixer.shapes(config).init_state(2, 16))
    assert hasattr(state, "capacity") == mixer.needs_capacity
    without = dataclasses.replace(config, attention_window=17)
    grown = jax.eval_shape(lambda: mixer.shapes(without).init_state(2, 16))
    assert jax.tree.structure(grown) == jax.tree.structure(state)
