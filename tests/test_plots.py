"""Plots: the numbers are right, the figures show them, and matplotlib is optional."""

import sys

import jax
import numpy as np
import pytest

from recurrentgemma import plots
from recurrentgemma.griffin import stack_layers
from tests.models import random_model, tiny_config
from tests.tolerances import assert_close

TOKENS, CHANNELS, HEADS = 5, 4, 3


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)

    def of(*shape):
        return rng.uniform(0.1, 0.9, (1, TOKENS, *shape))

    return {
        "blocks.0.mixer.decay": of(tiny_config().lru_width),
        "blocks.0.mixer.recurrence_gate": of(CHANNELS),
        "blocks.0.mixer.input_gate": of(CHANNELS),
        "blocks.0.mixer.effective_attention": of(CHANNELS, TOKENS) - 0.5,
        "blocks.2.mixer.probabilities": of(HEADS, TOKENS),
    }


def test_decays_are_those_of_the_parameters(model):
    found = plots.slowest_decays(model)
    assert list(found) == [0, 1]
    for index, decay in found.items():
        a_param = np.asarray(model.blocks[index].mixer.rg_lru.a_param[...], np.float64)
        assert_close(decay, np.exp(-8 * np.log1p(np.exp(a_param))), "layer")
    stacked = plots.slowest_decays(stack_layers(model))
    jax.tree.map(np.testing.assert_array_equal, stacked, found)


def test_a_memory_length_is_that_of_an_exponential():
    """What is held after so many tokens is 1/e, also where the decay changes."""
    decays = np.stack([np.full(1000, 0.99), np.tile([0.9, 1.0], 500)], axis=1)
    for decay, length in zip(decays.T, plots.memory_lengths(decays), strict=True):
        held = np.prod(decay[: round(length)])
        np.testing.assert_allclose(held, np.exp(-1), rtol=0.06)
    np.testing.assert_allclose(plots.memory_lengths(np.ones(2)), 1e9)


def test_mean_weights_are_shares_of_absolute_values(values):
    weights = values["blocks.0.mixer.effective_attention"][0]
    found = plots.mean_weights(weights)
    expected = np.zeros((TOKENS, TOKENS))
    for t in range(TOKENS):
        for s in range(TOKENS):
            expected[t, s] = sum(abs(weights[t, e, s]) for e in range(CHANNELS))
        expected[t] /= expected[t].sum()
    np.testing.assert_allclose(found, expected)


def test_figures_show_the_numbers(model, values, tmp_path):
    pytest.importorskip("matplotlib")
    spectrum = plots.decay_spectrum(model, values)
    decays, lengths = spectrum.axes
    shown = [line.get_ydata() for line in decays.lines]
    expected = [np.sort(decay) for decay in plots.slowest_decays(model).values()]
    np.testing.assert_array_equal(shown, expected)
    # Dashed for both layers, solid for the one whose values there are.
    drawn = [line for line in lengths.lines if len(line.get_ydata())]
    assert len(drawn) == 3

    pieces = ["def", " f", "(\n", "$x", ")"]
    gates = plots.gates(values, pieces)
    first = gates.axes[0].images[0].get_array()
    gate = values["blocks.0.mixer.recurrence_gate"]
    np.testing.assert_allclose(first, gate[0].mean(-1)[None])
    labels = [label.get_text() for label in gates.axes[1].get_xticklabels()]
    assert labels == ["def", " f", r"(\n", r"\$x", ")"]

    attention = plots.attention(values)
    titles = [axes.get_title() for axes in attention.axes[:2]]
    assert titles == ["layer 0: RG-LRU", "layer 2: attention"]
    probabilities = values["blocks.2.mixer.probabilities"][0]
    np.testing.assert_allclose(
        attention.axes[1].images[0].get_array(), plots.mean_weights(probabilities)
    )
    for i, figure in enumerate((spectrum, gates, attention)):
        figure.savefig(tmp_path / f"{i}.png")


def test_what_is_not_there_is_one_sentence(values, monkeypatch):
    hawkless = random_model(tiny_config(block_pattern=("local_attention",)))
    with pytest.raises(ValueError, match="^model: expected one with RG-LRU layers"):
        plots.decay_spectrum(hawkless)
    with pytest.raises(
        ValueError, match=r"^values: expected blocks\.\*\.mixer\.recurr"
    ):
        plots.gates({"embedding": np.zeros((1, 1, 1))})
    with pytest.raises(ValueError, match="^values: .* got none"):
        plots.attention({})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"^matplotlib: .*\[plot\]'$"):
        plots.gates(values)
