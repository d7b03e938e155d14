"""RecurrentGemma checkpoints of transformers: their numbers, and the way back."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.checkpoints import (
    FORMATS,
    load,
    named_parameters,
    read_config,
    save,
)
from recurrentgemma.checkpoints.recurrent_gemma import to_native_name
from recurrentgemma.checkpoints.tensors import array_source
from tests.models import forward
from tests.tolerances import assert_close

CASE = Path(__file__).parents[1] / "golden" / "transformers" / "recurrent_gemma"
OTHER_PYTHON = os.environ.get("TRANSFORMERS_PYTHON")
"""A Python with transformers and torch, if they are in another environment."""


@functools.cache
def data() -> dict[str, np.ndarray]:
    with np.load(CASE / "data.npz") as arrays:
        return dict(arrays)


@functools.cache
def model():
    """With one key less: transformers counts the query's own in its window."""
    config = read_config(CASE)
    config = dataclasses.replace(config, attention_window=config.attention_window - 1)
    return load(CASE, config=config)[0]


def test_the_window_is_that_of_the_trained_model():
    stored = json.loads((CASE / "config.json").read_text())
    assert read_config(CASE).attention_window == stored["attention_window_size"] == 8
    assert load(CASE)[0].config == read_config(CASE)


@pytest.mark.parametrize("length", ["short", "long"])
def test_logits(length):
    logits, _ = forward(model(), jnp.asarray(data()[f"{length}/tokens"]))
    assert_close(logits, data()[f"{length}/logits"], "logits")


def test_a_window_of_one_key_more_shows():
    logits, _ = forward(load(CASE)[0], jnp.asarray(data()["long/tokens"]))
    assert np.abs(logits - data()["long/logits"]).max() > 0.1


@jax.jit
def loss_and_gradient(model, tokens):
    def loss(model):
        hidden, _ = model(tokens)
        log_probabilities = jax.nn.log_softmax(model.logits(hidden)[:, :-1])
        targets = tokens[:, 1:, None]
        return -jnp.take_along_axis(log_probabilities, targets, axis=-1).mean()

    return jax.value_and_grad(loss)(model)


def test_loss_and_gradients():
    loss, gradient = loss_and_gradient(model(), jnp.asarray(data()["long/tokens"]))
    assert_close(loss, data()["long/loss"], "loss")
    ours = named_parameters(gradient)
    stored = {
        key.removeprefix("long/grad/"): expected
        for key, expected in data().items()
        if key.startswith("long/grad/")
    }
    assert len(stored) == 31
    for key, expected in stored.items():
        name, orientation = to_native_name(key)
        source = orientation.to_native(array_source(jnp.asarray(expected)))
        assert_close(ours[name], source.load(), "gradient")


@pytest.mark.parametrize("case", ["generate_0", "generate_1"])
def test_greedy_generation(case):
    prompt, expected = (
        data()[f"{case}/{name}"] for name in ("prompt_tokens", "tokens")
    )
    logits, cache = forward(model(), jnp.asarray(prompt))
    new_logits, new_tokens = [], []
    for _ in range(expected.shape[1]):
        new_logits.append(logits[:, -1])
        new_tokens.append(logits[:, -1].argmax(-1).astype(jnp.int32))
        logits, cache = forward(model(), new_tokens[-1][:, None], cache=cache)
    np.testing.assert_array_equal(jnp.stack(new_tokens, axis=1), expected)
    assert_close(jnp.stack(new_logits, axis=1), data()[f"{case}/logits"], "logits")


def test_written_tensors_are_those_that_were_read(tmp_path):
    save(tmp_path / "saved", load(CASE)[0], None, format="hugging_face")
    ours, theirs = (
        FORMATS["hugging_face"].read(path).tensors
        for path in (tmp_path / "saved", CASE)
    )
    assert set(ours) == set(theirs)
    for name, source in theirs.items():
        np.testing.assert_array_equal(ours[name].load(), source.load())
    written, stored = (
        json.loads((path / "config.json").read_text())
        for path in (tmp_path / "saved", CASE)
    )
    del written["written_by"]
    assert written == {key: stored[key] for key in written}


EXPORT_CHECK = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM

path, tokens, logits = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    tokens = torch.from_numpy(np.load(tokens)).long()
    np.save(logits, model.float()(tokens, use_cache=False).logits.numpy())
"""


@pytest.mark.skipif(
    not (OTHER_PYTHON or importlib.util.find_spec("transformers")),
    reason="transformers is not installed; TRANSFORMERS_PYTHON may name a Python",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_loads_in_transformers_with_the_same_logits(dtype, tmp_path):
    exported = load(CASE, param_dtype=dtype)[0]
    save(tmp_path / "saved", exported, None, format="hugging_face")
    window = exported.config.attention_window
    tokens = np.random.default_rng(0).integers(0, 160, (3, window), np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    command = [OTHER_PYTHON or sys.executable, "-c", EXPORT_CHECK]
    paths = [tmp_path / name for name in ("saved", "tokens.npy", "logits.npy")]
    # Elsewhere than the root, where `kernels` would hide a package that it imports.
    subprocess.run([*command, *map(str, paths)], check=True, cwd=tmp_path)
    logits, _ = forward(exported, jnp.asarray(tokens))
    assert_close(logits, np.load(tmp_path / "logits.npy"), "logits")
