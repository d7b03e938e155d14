"""Post-training: each recipe reads what it says, and its model is measured."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.benchmarks import forgetting, post_training
from recurrentgemma.benchmarks.post_training import Plan, batches
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.training.data import PackedTokens
from recurrentgemma.training.step import mean_loss
from tests.models import random_model, tiny_config

PLAN = Plan(steps=3, rows=2, row_tokens=8, exact_tokens=16, learning_rate=1e-2)
FLAGS = {
    "models": ["tiny"],
    "recipes": ["before", "passed", "exact"],
    "steps": 3,
    "rows": 2,
    "row-tokens": "8",
    "exact-rows": "16",
    "length": "16",
    "files": 1,
    "learning-rate": 1e-2,
}


@pytest.fixture
def packed():
    rng = np.random.default_rng(0)
    return PackedTokens([rng.integers(0, 40, 90).tolist() for _ in range(2)], 8)


def test_carried_rows_are_in_the_order_of_the_text(packed):
    """Position follows position; other recipes read rows in random order."""
    first, second, third = batches(packed, PLAN, "carried", seed=0)
    for before, after in ((first, second), (second, third)):
        np.testing.assert_array_equal(before.targets[:, -1], after.tokens[:, 0])
        np.testing.assert_array_equal(
            before.positions[:, -1] + 1, after.positions[:, 0]
        )
    shuffled = list(batches(packed, PLAN, "passed", seed=0))
    assert len(shuffled) == 3 and shuffled[0].tokens.shape == (2, 8)
    assert (shuffled[0].targets[:, -1] != shuffled[1].tokens[:, 0]).any()


def test_each_recipe_is_a_row(tmp_path, monkeypatch, packed):
    model = random_model(tiny_config(block_pattern=("min_gru",), num_layers=1))
    documents = [packed.rows(np.array([i])).tokens[0].tolist() for i in range(12)]
    measured = {}

    def remember(model, tokenizer, length, most_files, *, title):
        measured[title] = named_parameters(model)
        points = [{"length": 8, "nats": 2.0}], [{"length": 4, "distance": 0.5}]
        return dict(zip(("by_position", "effrem"), points, strict=True)) | {
            "last_nats": 2.0,
            "last_distance": 0.5,
        }

    monkeypatch.setattr(post_training, "load", lambda name: (model, "tokenizer"))
    monkeypatch.setattr(post_training, "training_tokens", lambda *_: documents)
    monkeypatch.setattr(forgetting, "remember", remember)
    post_training.run(FLAGS, tmp_path)
    document = json.loads((tmp_path / "post_training.json").read_text())
    rows = {row["recipe"]: row for row in document["rows"]}
    assert list(rows) == FLAGS["recipes"]
    assert "losses" not in rows["before"]
    [batch, *_] = batches(PackedTokens(documents, 16), PLAN, "exact", seed=0)
    assert batch.tokens.shape == (1, 16)
    np.testing.assert_allclose(
        rows["exact"]["losses"][0], mean_loss(model, batch), rtol=1e-5
    )
    name = "blocks.0.mixer.linear_h.kernel"
    base = measured["before"][name]
    for recipe in ("passed", "exact"):
        assert len(rows[recipe]["losses"]) == 3
        assert jnp.abs(measured[recipe][name] - base).max() > 1e-4
    measured.clear()
    post_training.run(FLAGS, tmp_path)
    assert not measured, "what is there is not measured again"
    with pytest.raises(ValueError, match="expected results with plan"):
        post_training.run(FLAGS | {"steps": 4}, tmp_path)
    with pytest.raises(ValueError, match="--recipes: expected one of before, zero"):
        post_training.run(FLAGS | {"recipes": ["one"]}, tmp_path)
