"""Matrices that are int8 while they are loaded: right values, everywhere the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from recurrentgemma import Sampler, Sampling, cost, load, save
from recurrentgemma.adapters import add_adapters, merge_adapters
from recurrentgemma.checkpoints import convert, named_parameters, tensors
from recurrentgemma.checkpoints.parameters import parameter_values, with_values
from recurrentgemma.generation.model_digest import model_digest
from recurrentgemma.griffin import stack_layers
from recurrentgemma.matrices import INT8_MAX, Quantized
from tests.checkpoints.checkpoints import (
    BYTES_AT_ONCE,
    assert_same_files,
    assert_same_parameters,
    config,
    every_format,
    model,
)
from tests.models import forward, random_tokens
from tests.tolerances import assert_close

TOKENS = random_tokens((2, 12))
FLOATING = {"gate", "conv_1d", "scale", "bias", "a_param"}
"""Parts of the names of what stays in floating point."""


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", BYTES_AT_ONCE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save(path, model(), None)
    return path


@pytest.fixture(scope="module")
def quantized(saved):
    return load(saved, quantize="int8")[0]


def rounded(name, array):
    """int8 values and scales, written out: by channel, or by token."""
    axis = 1 if name == "embedder.embedding" else 0
    scales = np.abs(array).max(axis=axis, keepdims=True) / np.float32(INT8_MAX)
    return np.rint(array / scales), scales


@every_format
def test_values_of_every_layout(layout, tmp_path):
    """Read in slices along either axis."""
    save(tmp_path / "saved", model(), None, format=layout)
    loaded, _ = load(tmp_path / "saved", config=config(), quantize="int8")
    found, stored = parameter_values(loaded), named_parameters(model())
    assert found.keys() == stored.keys()
    quantised = set()
    for name, value in found.items():
        array = np.asarray(stored[name])
        if not isinstance(value, Quantized):
            assert_close(value, array, "layer")
            continue
        quantised.add(name)
        values, scales = rounded(name, array)
        assert value.values.dtype == jnp.int8
        # One rounding of the stored value, of the scale and of their ratio.
        assert np.abs(np.asarray(value.values) - values).max() <= 1
        assert np.mean(np.asarray(value.values) != values) < 0.01
        np.testing.assert_allclose(value.scales, scales, rtol=1e-6)
        error = np.abs(value.materialize() - array)
        assert (error <= 0.5001 * scales).all()
    left = found.keys() - quantised
    matrices = {n for n in found if n.endswith(("kernel", "embedding"))}
    assert all(
        FLOATING & set(name.replace("_gate", ".gate").split(".")) for name in left
    )
    assert {
        n for n in left & matrices if "rg_lru" not in n and "conv" not in n
    } == set()


def test_it_computes_what_its_matrices_say(quantized):
    """In one call, in chunks and in decode steps."""
    dequantised = with_values(
        quantized,
        {n: v[...] for n, v in parameter_values(quantized).items()},
    )
    expected = forward(dequantised, TOKENS)[0]
    found = forward(quantized, TOKENS)[0]
    assert_close(found, expected, "logits")
    parts, cache = [], None
    for start, stop in [(0, 10), (10, 11), (11, 12)]:
        part, cache = forward(quantized, TOKENS[:, start:stop], cache=cache)
        parts.append(part)
    assert_close(jnp.concatenate(parts, axis=1), expected, "logits")
    plain = forward(model(), TOKENS)[0]
    assert 1e-3 < np.abs(expected - plain).max() < 0.1 * np.abs(plain).max()


def test_channels_of_zeros(tmp_path):
    emptied = {
        name: array.at[:, 0].set(0)
        for name, array in named_parameters(model()).items()
        if name.endswith("mlp.up.kernel")
    }
    save(tmp_path / "saved", with_values(model(), emptied), None)
    loaded, _ = load(tmp_path / "saved", quantize="int8")
    for name in emptied:
        value = parameter_values(loaded)[name]
        assert not value.scales[0, 0] and not value.materialize()[:, 0].any()


def test_saved_natively_and_nowhere_else(saved, quantized, tmp_path):
    save(tmp_path / "small", quantized, None)
    small, large = (
        (path / "model.safetensors").stat().st_size
        for path in (tmp_path / "small", saved)
    )
    assert small < 0.6 * large
    for again in (
        load(tmp_path / "small")[0],
        load(tmp_path / "small", quantize="int8", param_dtype=jnp.float32)[0],
    ):
        assert_same_parameters(again, quantized)
    save(tmp_path / "stacked", stack_layers(quantized), None)
    assert_same_files("native", tmp_path / "stacked", tmp_path / "small")
    with pytest.raises(ValueError, match="format: expected 'native', which alone"):
        save(tmp_path / "other", quantized, None, format="hugging_face")
    with pytest.raises(ValueError, match=r"(?s)missing: .*unexpected: .*\.values"):
        convert(tmp_path / "small", tmp_path / "other", format="hugging_face")
    assert not (tmp_path / "other").exists()


def test_errors(saved):
    with pytest.raises(ValueError, match="quantize: expected.*int8.*got 'int3'"):
        load(saved, quantize="int3")


def test_on_several_devices(saved, quantized):
    mesh = jax.make_mesh((2, 4), ("data", "model"))

    def choose(name, shape):
        spec = ["model" if size % 4 == 0 else None for size in shape]
        spec[:-1] = [None] * (len(spec) - 1)
        return NamedSharding(mesh, PartitionSpec(*spec))

    loaded, _ = load(saved, quantize="int8", sharding=choose)
    value = parameter_values(loaded)["blocks.0.mlp.up.kernel"]
    assert value.values.sharding.spec == value.scales.sharding.spec
    assert value.values.sharding.spec[-1] == "model"
    assert_close(
        jax.device_get(forward(loaded, TOKENS)[0]),
        forward(quantized, TOKENS)[0],
        "logits",
    )


def test_it_is_another_model_for_a_prefix(quantized):
    assert model_digest(quantized) != model_digest(model())


def test_adapters_on_a_quantised_base(quantized):
    """Nothing but the adapters is in floating point; merged, everything is."""
    adapted = add_adapters(quantized, rank=2, rngs=nnx.Rngs(0))
    assert (
        named_parameters(adapted)["blocks.0.mlp.up.kernel.base.values"].dtype
        == jnp.int8
    )
    np.testing.assert_array_equal(
        forward(adapted, TOKENS)[0], forward(quantized, TOKENS)[0]
    )
    noisy = {n: a + 0.1 for n, a in named_parameters(adapted).items() if "lora_" in n}
    arrays = named_parameters(adapted) | noisy
    adapted = jax.tree.structure(adapted).unflatten(arrays.values())
    merged = merge_adapters(adapted)
    assert list(named_parameters(merged)) == list(named_parameters(model()))
    assert_close(forward(adapted, TOKENS)[0], forward(merged, TOKENS)[0], "logits")


def test_cost_is_what_is_in_memory():
    for quantize in (None, "int8"):
        loaded, _ = load("nano", quantize=quantize)
        counted = cost.parameter_bytes(
            loaded.config, "float32", quantized=quantize is not None
        )
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) == counted


@pytest.mark.slow
def test_sampling(quantized):
    sampler = Sampler(quantized, compile_ahead=False)
    prompt = TOKENS[0, :5].tolist()
    [sample] = sampler([prompt], max_new_tokens=8, sampling=Sampling(0), end_tokens=[])
    [logits] = forward(quantized, jnp.array([prompt + sample.tokens]))[0]
    np.testing.assert_array_equal(sample.tokens, logits[4:-1].argmax(-1))
