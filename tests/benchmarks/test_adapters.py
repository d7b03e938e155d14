"""The ways of fine-tuning, side by side, on a tiny model."""

import json

import numpy as np

from recurrentgemma import load
from recurrentgemma.benchmarks import adapters
from tests.models import random_model, tiny_config


def test_every_way_is_a_row(tmp_path, monkeypatch):
    _, tokenizer = load("nano")
    config = tiny_config(
        vocab_size=tokenizer.vocab_size,
        block_pattern=("recurrent", "local_attention"),
        num_layers=2,
    )
    model = random_model(config)
    [row] = adapters.corpus_rows(tokenizer)[:1]
    corpus = type(row)(*(np.asarray(array)[:1, :16] for array in row))
    monkeypatch.setattr(adapters, "load", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr(adapters, "corpus_rows", lambda _: [corpus])
    monkeypatch.setattr(adapters, "HELD_OUT", 4)
    monkeypatch.setattr(adapters, "ANSWERED", 2)
    monkeypatch.setattr(adapters, "PREFIX_TOKENS", 12)
    values = {"model": "tiny", "rank": 5, "steps": 4, "batch": 2}
    rates = {"learning-rate": 1e-2, "prefix-learning-rate": 1e-2}
    adapters.run(values | rates, tmp_path)
    rows = json.loads((tmp_path / "adapters.json").read_text())["rows"]
    untouched, read, learned, *loras, whole = rows
    assert untouched["trained"] == read["trained"] == 0
    assert learned["corpus_loss"] == untouched["corpus_loss"]
    assert len({row["held_out_loss"] for row in rows}) == len(rows)
    # The prefix is smaller than adapters of any rank; a rank is asked for besides.
    assert [row["name"] for row in loras] == ["LoRA, rank 1", "LoRA, rank 5"]
    assert 5 * loras[0]["trained"] == loras[1]["trained"] > learned["trained"] > 0
    assert whole["trained"] > loras[-1]["trained"]
