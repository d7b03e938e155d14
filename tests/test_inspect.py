"""Values by name: right, alike in every way of running, and free where unused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import Runtime
from recurrentgemma.griffin import stack_layers
from recurrentgemma.inspect import capture, with_observer
from tests.models import forward, random_model, random_tokens, tiny_config
from tests.tolerances import assert_close

BATCH, LENGTH = 2, 9
CONFIG = tiny_config(
    block_pattern=("recurrent", "local_attention", "min_gru"), num_layers=3
)
POSITIONS = np.array([[0, 1, -1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, -1, -1]])
"""Padding inside and at the end of rows; two documents."""


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens((BATCH, LENGTH))


@pytest.fixture(scope="module")
def captured(model, tokens):
    return capture(model, "*")(tokens, POSITIONS)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_values_equal_a_computation_by_hand(model, captured):
    """RG-LRU in float64, step by step, from the convolution's output."""
    values = {name: np.asarray(x, np.float64) for name, x in captured[2].items()}
    unit = model.blocks[0].mixer.rg_lru
    place = "blocks.0.mixer"
    u = values[f"{place}.conv"]

    def gate(parameters):
        kernel, bias = (np.asarray(x, np.float64) for x in parameters.gate)
        blocks = u.reshape(BATCH, LENGTH, len(kernel), -1)
        return _sigmoid(np.einsum("btgi,gio->btgo", blocks, kernel) + bias).reshape(
            u.shape
        )

    r, i = gate(unit.recurrence_gate), gate(unit.input_gate)
    a = np.exp(-8 * np.log1p(np.exp(np.asarray(unit.a_param[...], np.float64))) * r)
    h, states = np.zeros((BATCH, u.shape[-1])), []
    for t in range(LENGTH):
        start = (POSITIONS[:, t] == 0)[:, None]
        after = a[:, t] * h + np.sqrt(1 - a[:, t] ** 2) * i[:, t] * u[:, t]
        after = np.where(start, i[:, t] * u[:, t], after)
        h = np.where((POSITIONS[:, t] < 0)[:, None], h, after)
        states.append(h)
    real = (POSITIONS >= 0)[..., None]
    expected = {"recurrence_gate": r, "input_gate": i, "decay": a}
    expected |= {"state": np.stack(states, 1), "recurrence": np.stack(states, 1)}
    for name, value in expected.items():
        actual = values[f"{place}.{name}"]
        assert_close(np.where(real, actual, 0), np.where(real, value, 0), "layer")
    stream = values["embedding"] + values[f"{place}"] + values["blocks.0.mlp"]
    assert_close(values["blocks.0.residual"], stream, "layer")


def test_capturing_changes_nothing(model, tokens, captured):
    hidden, cache, _ = captured
    expected, expected_cache = model(tokens, POSITIONS)
    assert_close(hidden, expected, "layer")
    for ours, theirs in zip(
        jax.tree.leaves(cache), jax.tree.leaves(expected_cache), strict=True
    ):
        assert_close(ours, theirs, "cache")


def test_steps_show_what_the_whole_shows(model, tokens, captured):
    """Token by token, where the decode step op would run unobserved."""
    cache, look = model.init_cache(BATCH), capture(model, "*")
    whole = captured[2]
    for t in range(LENGTH):
        _, cache, values = look(tokens[:, t : t + 1], POSITIONS[:, t : t + 1], cache)
        assert set(values) == set(whole)
        real = POSITIONS[:, t] >= 0
        for name, value in values.items():
            ours, theirs = (
                np.asarray(x)[real] for x in (value[:, 0], whole[name][:, t])
            )
            assert_close(ours, theirs, "layer")


def test_rematerialised_and_stacked_layers_show_the_same(tokens, captured):
    runtime = Runtime(compute_dtype="float32", remat=True)
    stacked = stack_layers(random_model(CONFIG, runtime=runtime))
    _, _, values = capture(stacked, "blocks.?.mixer.state")(tokens, POSITIONS)
    assert list(values) == ["blocks.0.mixer.state", "blocks.2.mixer.state"]
    for name, value in values.items():
        assert_close(value, captured[2][name], "layer")


def test_a_pattern_that_matches_nothing(model, tokens):
    with pytest.raises(ValueError, match=r"patterns: .*'blocks.9'.*blocks.0.mixer.dec"):
        capture(model, ["embedding", "blocks.9"])(tokens)


@dataclasses.dataclass(frozen=True)
class _Replace:
    """Multiplies the value of a name."""

    name: str
    factor: float

    def sees(self, name):
        return name == self.name

    def replaces(self, name):
        return name == self.name

    def __call__(self, name, value):
        return self.factor * value


def _edited_by_hand(name):
    """Another model of the same function as one whose value of this name is zero."""
    model = random_model(CONFIG)
    mixer = model.blocks[0].mixer
    if name == "blocks.1.mixer":
        model.blocks[1].mixer.proj_out.kernel[...] *= 0
        model.blocks[1].mixer.proj_out.bias[...] *= 0
    elif name == "blocks.0.mixer.input_gate":
        mixer.rg_lru.input_gate.kernel[...] *= 0
        mixer.rg_lru.input_gate.bias[...] = jnp.full_like(
            mixer.rg_lru.input_gate.bias[...], -1e9
        )
    return model


@pytest.mark.parametrize("name", ["blocks.1.mixer", "blocks.0.mixer.input_gate"])
def test_replacing_holds_in_a_chunk_and_in_every_step(model, tokens, name):
    edited = with_observer(model, _Replace(name, 0.0))
    assert model.observer is None
    expected, _ = forward(_edited_by_hand(name), tokens, POSITIONS)
    actual, _ = forward(edited, tokens, POSITIONS)
    real = (POSITIONS >= 0)[..., None]
    assert_close(np.where(real, actual, 0), np.where(real, expected, 0), "logits")
    assert np.abs(
        np.where(real, forward(model, tokens, POSITIONS)[0] - actual, 0)
    ).max()
    cache = edited.init_cache(BATCH)
    for t in range(LENGTH):
        step = tokens[:, t : t + 1], POSITIONS[:, t : t + 1]
        logits, cache = forward(edited, *step, cache)
        assert_close(logits[:, 0] * real[:, t], expected[:, t] * real[:, t], "logits")


def test_an_observer_that_sees_nothing_costs_nothing(model, tokens):
    def program(model):
        return str(jax.make_jaxpr(lambda t: model(t)[0])(tokens))

    assert program(with_observer(model, _Replace("none", 1.0))) == program(model)
    assert program(with_observer(model, _Replace("embedding", 2.0))) != program(model)
