"""Loss by position and effective remembrance, against plain forward passes."""

import json

import jax
import numpy as np
import pytest

from recurrentgemma.benchmarks import forgetting
from tests.models import forward, random_model, random_tokens, tiny_config


def test_nats_by_position_are_those_of_one_forward_pass():
    model = random_model(tiny_config())
    rows = np.asarray(random_tokens((2, 30)))
    nats = forgetting.nats_by_position(model, rows)
    log_p = jax.nn.log_softmax(forward(model, rows[:, :-1])[0])
    expected = -np.take_along_axis(np.asarray(log_p), rows[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-4)


def test_a_window_forgets_what_lies_beyond_it():
    """Of local attention alone; the whole past against its last tokens."""
    config = tiny_config(
        block_pattern=("local_attention",), num_layers=1, attention_window=4
    )
    model, [row] = random_model(config), np.asarray(random_tokens((1, 24)))
    distances = forgetting.effective_remembrance(model, row, [16, 24], [2, 5, 16])
    assert distances.shape == (2, 3)
    assert distances[:, 0].min() > 1e-3
    np.testing.assert_allclose(distances[:, 1:], 0, atol=1e-4)

    hidden = forward(model, row[None, :16])[0][0, -1], forward(model, row[None, 14:16])
    whole, near = jax.nn.softmax(hidden[0]), jax.nn.softmax(hidden[1][0][0, -1])
    np.testing.assert_allclose(
        distances[0, 0], 0.5 * np.abs(whole - near).sum(), atol=1e-5
    )


def test_a_model_is_measured_once_for_each_length(tmp_path, monkeypatch):
    measured = []

    def measure(place, name, length, most_files):
        measured.append((place, name, length, most_files))
        by_position = [{"length": 8, "nats": 2.0}, {"length": 16, "nats": 1.0}]
        effrem = [{"length": 4, "distance": 0.5}]
        row = {"files": 1, "by_position": by_position, "effrem": effrem}
        return row | {"last_nats": 1.0, "last_distance": 0.5}

    monkeypatch.setattr(forgetting, "measure", measure)
    for length in ("32", "64", "64"):
        values = {"models": ["mine=a/b"], "length": length, "files": 2}
        forgetting.run(values, tmp_path)
    assert measured == [("a/b", "mine", 32, 2), ("a/b", "mine", 64, 2)]
    rows = json.loads((tmp_path / "forgetting.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [32, 64]
    assert (tmp_path / "forgetting.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="--length: expected at least 16 tokens"):
        forgetting.run(values | {"length": "8"}, tmp_path)
