"""Checkpoints of transformers, for every model type: their numbers, and the way back."""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import PRESETS
from recurrentgemma.adapters import merge_adapters
from recurrentgemma.checkpoints import (
    FORMATS,
    load,
    named_parameters,
    read_config,
    save,
)
from recurrentgemma.checkpoints.hugging_face import MODEL_TYPES
from recurrentgemma.checkpoints.model_types import config_from_json, config_to_json
from recurrentgemma.checkpoints.tensors import array_source
from tests.checkpoints.checkpoints import assert_same_files
from tests.models import adapt, forward
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())
STORED = {
    case: json.loads((GOLDEN / case / "config.json").read_text()) for case in CASES
}
OTHER_PYTHON = os.environ.get("TRANSFORMERS_PYTHON")
"""A Python with transformers and torch, if they are in another environment."""
needs_transformers = pytest.mark.skipif(
    not (OTHER_PYTHON or importlib.util.find_spec("transformers")),
    reason="transformers is not installed; TRANSFORMERS_PYTHON may name a Python",
)
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def data(case) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / "data.npz") as arrays:
        return dict(arrays)


@functools.cache
def model(case):
    """The model as transformers runs it: its RecurrentGemma has a window of one key
    less than the trained model."""
    config = read_config(GOLDEN / case)
    if STORED[case]["model_type"] == "recurrent_gemma":
        window = config.attention_window - 1
        config = dataclasses.replace(config, attention_window=window)
    return load(GOLDEN / case, config=config)[0]


def test_every_model_type_has_a_case():
    assert {stored["model_type"] for stored in STORED.values()} == set(MODEL_TYPES)


def test_the_window_is_that_of_the_trained_model():
    config = read_config(GOLDEN / "recurrent_gemma")
    assert config.attention_window == 8
    assert STORED["recurrent_gemma"]["attention_window_size"] == 8
    assert load(GOLDEN / "recurrent_gemma")[0].config == config
    assert read_config(GOLDEN / "gemma2").attention_window == 7
    assert STORED["gemma2"]["sliding_window"] == 8


@every_case
@pytest.mark.parametrize("length", ["short", "long"])
def test_logits(case, length):
    logits, _ = forward(model(case), jnp.asarray(data(case)[f"{length}/tokens"]))
    assert_close(logits, data(case)[f"{length}/logits"], "logits")


@pytest.mark.parametrize("case", ["recurrent_gemma", "gemma2"])
def test_a_window_of_one_key_more_shows(case):
    config = model(case).config
    wider = dataclasses.replace(config, attention_window=config.attention_window + 1)
    tokens = jnp.asarray(data(case)["long/tokens"])
    logits, _ = forward(load(GOLDEN / case, config=wider)[0], tokens)
    assert np.abs(logits - data(case)["long/logits"]).max() > 0.1


@jax.jit
def loss_and_gradient(model, tokens):
    def loss(model):
        hidden, _ = model(tokens)
        log_probabilities = jax.nn.log_softmax(model.logits(hidden)[:, :-1])
        targets = tokens[:, 1:, None]
        return -jnp.take_along_axis(log_probabilities, targets, axis=-1).mean()

    return jax.value_and_grad(loss)(model)


@every_case
def test_loss_and_gradients(case):
    names = MODEL_TYPES[STORED[case]["model_type"]].names
    loss, gradient = loss_and_gradient(
        model(case), jnp.asarray(data(case)["long/tokens"])
    )
    assert_close(loss, data(case)["long/loss"], "loss")
    ours = named_parameters(gradient)
    stored = {
        key.removeprefix("long/grad/"): expected
        for key, expected in data(case).items()
        if key.startswith("long/grad/")
    }
    assert len(stored) >= 10
    for key, expected in stored.items():
        name, orientation = names.to_native(key)
        source = orientation.to_native(array_source(jnp.asarray(expected)))
        assert_close(ours[name], source.load(), "gradient")


@every_case
@pytest.mark.parametrize("run", ["generate_0", "generate_1"])
def test_greedy_generation(case, run):
    prompt, expected = (
        data(case)[f"{run}/{name}"] for name in ("prompt_tokens", "tokens")
    )
    rows, length = prompt.shape
    cache = model(case).init_cache(rows, capacity=length + expected.shape[1])
    logits, cache = forward(model(case), jnp.asarray(prompt), cache=cache)
    new_logits, new_tokens = [], []
    for _ in range(expected.shape[1]):
        new_logits.append(logits[:, -1])
        new_tokens.append(logits[:, -1].argmax(-1).astype(jnp.int32))
        logits, cache = forward(model(case), new_tokens[-1][:, None], cache=cache)
    np.testing.assert_array_equal(jnp.stack(new_tokens, axis=1), expected)
    stacked = jnp.stack(new_logits, axis=1)
    assert_close(stacked, data(case)[f"{run}/logits"], "logits")


@pytest.mark.parametrize("count", [3, 7, 20])
def test_a_local_ring_is_no_longer_than_the_capacity(count):
    """Capacity below the window, equal to it and above it, in three chunks."""
    config, stored = model("gemma2").config, data("gemma2")
    tokens = jnp.asarray(stored["long/tokens"])[:, :count]
    cache = model("gemma2").init_cache(len(tokens), capacity=count)
    rings = [layer.positions.shape[1] for layer in cache.layers]
    assert rings == [min(config.attention_window, count), count] * 2
    logits = []
    for part in (tokens[:, :1], tokens[:, 1:-1], tokens[:, -1:]):
        chunk, cache = forward(model("gemma2"), part, cache=cache)
        logits.append(chunk)
    joined = jnp.concatenate(logits, axis=1)
    assert_close(joined, stored["long/logits"][:, :count], "logits")


@every_case
def test_written_tensors_are_those_that_were_read(case, tmp_path):
    save(tmp_path / "saved", load(GOLDEN / case)[0], None, format="hugging_face")
    ours, theirs = (
        FORMATS["hugging_face"].read(path).tensors
        for path in (tmp_path / "saved", GOLDEN / case)
    )
    assert set(ours) == set(theirs)
    for name, source in theirs.items():
        np.testing.assert_array_equal(ours[name].load(), source.load())
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    del written["written_by"]
    stored = {"hidden_act": "gelu_pytorch_tanh", **STORED[case]}
    assert written == {key: stored[key] for key in written}


def test_a_second_name_of_a_layout_loses_nothing(tmp_path, monkeypatch):
    """It is written under the first name."""
    case = "gemma1_like_2b_mqa"
    monkeypatch.setitem(MODEL_TYPES, "gemma_text", MODEL_TYPES["gemma"])
    other = shutil.copytree(
        GOLDEN / case, tmp_path / "other", copy_function=shutil.copy
    )
    content = {**STORED[case], "model_type": "gemma_text"}
    (other / "config.json").write_text(json.dumps(content))
    save(tmp_path / "saved", load(other)[0], None, format="hugging_face")
    save(tmp_path / "first", load(GOLDEN / case)[0], None, format="hugging_face")
    assert_same_files("hugging_face", tmp_path / "saved", tmp_path / "first")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["model_type"] == "gemma"


PRESET_TYPES = {
    name: {"recurrentgemma": "recurrent_gemma"}.get(
        family := name.split("-")[0], family
    )
    for name in PRESETS
    if name.startswith(("recurrentgemma", "gemma"))
}


@pytest.mark.parametrize("name", PRESET_TYPES)
def test_config_json_of_every_released_preset_is_its_own_inverse(name):
    kind, content = config_to_json(MODEL_TYPES, PRESETS[name])
    assert kind == PRESET_TYPES[name]
    content = json.loads(json.dumps(content))
    assert config_from_json(MODEL_TYPES[kind], content) == PRESETS[name]


def test_config_json_of_released_checkpoints():
    """Settings as in the released files, which older versions of transformers wrote."""
    recurrent = {
        "model_type": "recurrent_gemma",
        "attention_bias": False,
        "attention_window_size": 2048,
        "block_types": ["recurrent", "recurrent", "attention"],
        "conv1d_width": 4,
        "embeddings_scale_by_sqrt_dim": True,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2560,
        "intermediate_size": 15360,
        "logits_soft_cap": 30.0,
        "lru_width": 2560,
        "num_attention_heads": 10,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    }
    preset = PRESETS["recurrentgemma-2b"]
    assert config_from_json(MODEL_TYPES["recurrent_gemma"], recurrent) == preset
    gemma = {
        "attention_bias": False,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    }
    assert config_from_json(MODEL_TYPES["gemma"], gemma) == PRESETS["gemma-2b"]
    gemma2 = {
        **gemma,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "sliding_window": 4096,
    }
    assert config_from_json(MODEL_TYPES["gemma2"], gemma2) == PRESETS["gemma2-27b"]


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("gemma2", {"rope_scaling": {"factor": 2}}, "only None is supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "only False is supported"),
        ("gemma2", {"sliding_window": None}, "sliding_window is None; expected a pos"),
        ("gemma2", {"layer_types": ["sliding_attention", "x"]}, "block_pattern.*'x'"),
        ("gemma1_like_2b_mqa", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("gemma1_like_2b_mqa", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_settings_that_are_not_supported(case, fields, message):
    model_type = MODEL_TYPES[STORED[case]["model_type"]]
    with pytest.raises(ValueError, match=message):
        config_from_json(model_type, {**STORED[case], **fields})


def in_transformers(program: str, *arguments: str, folder: Path) -> None:
    """Runs a program in a folder, with a Python that has transformers.

    Elsewhere than in the root, where `kernels` would hide a package that it imports.
    """
    command = [OTHER_PYTHON or sys.executable, "-c", program, *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, cwd=folder, env=environment)


EXPORT_CHECK = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM

path, tokens, logits = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, output_loading_info=True
)
assert not any(info.values()), info
with torch.no_grad():
    tokens = torch.from_numpy(np.load(tokens)).long()
    np.save(logits, model(tokens, use_cache=False).logits.numpy())
"""


@needs_transformers
@every_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_loads_in_transformers_with_the_same_logits(case, dtype, tmp_path):
    exported = load(GOLDEN / case, param_dtype=dtype)[0]
    assert_same_in_transformers(exported, exported, tmp_path)


@needs_transformers
@every_case
def test_merged_adapters_have_the_same_logits_in_transformers(case, tmp_path):
    adapted = adapt(load(GOLDEN / case, param_dtype="float32")[0])
    assert_same_in_transformers(merge_adapters(adapted), adapted, tmp_path)


def assert_same_in_transformers(exported, expected, folder) -> None:
    """A saved model has the logits of `expected` there."""
    save(folder / "saved", exported, None, format="hugging_face")
    # As many tokens as RecurrentGemma's window: beyond it transformers differs.
    tokens = np.random.default_rng(0).integers(
        0, exported.config.vocab_size, (3, 8), np.int32
    )
    np.save(folder / "tokens.npy", tokens)
    in_transformers(EXPORT_CHECK, "saved", "tokens.npy", "logits.npy", folder=folder)
    logits, _ = forward(expected, jnp.asarray(tokens))
    assert_close(logits, np.load(folder / "logits.npy"), "logits")
