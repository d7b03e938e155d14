"""The benchmark of int8 runs from end to end, and its decode loop decodes."""

import json

import jax.numpy as jnp
import numpy as np

from recurrentgemma.benchmarks import quantization
from tests.models import forward, random_model, tiny_config

CONFIG = tiny_config(num_layers=1)


def test_rows_of_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "CONFIG", CONFIG)
    monkeypatch.setattr(quantization, "read_documents", lambda source: [])
    monkeypatch.setattr(quantization, "split_held_out", lambda documents: ([], []))
    values = {"models": [], "documents": 1, "steps": 2, "repeats": 2, "batch": ["1"]}
    quantization.run(values, tmp_path)
    document = json.loads((tmp_path / "quantization.json").read_text())
    stored, int8 = document["rows"]
    assert [stored["name"], int8["name"]] == [quantization.UNQUANTIZED, "int8"]
    assert int8["parameter_bytes"] < 0.6 * stored["parameter_bytes"]
    for row in (stored, int8):
        assert len(row["decode"]["1"]["samples"]) == 2
    assert int8["decode"]["1"]["advantage"] > 0


def test_the_loop_decodes():
    model = random_model(CONFIG)
    cache, tokens = model.init_cache(2), jnp.zeros((2, 1), jnp.int32)
    written, _ = quantization._decode(model, tokens, cache, 3)
    for _ in range(3):
        logits, cache = forward(model, tokens, cache=cache)
        tokens = logits.argmax(-1).astype(jnp.int32)
    np.testing.assert_array_equal(written, tokens)
