"""The benchmarks of needles and of shared examples: rows, resuming, pictures."""

import json

import pytest

from recurrentgemma import cli
from recurrentgemma.benchmarks import few_shot
from recurrentgemma.checkpoints import load, save
from tests.models import random_model, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = load("nano")[1]
    config = tiny_config(vocab_size=tokenizer.vocab_size, num_layers=1)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(path, random_model(config), tokenizer)
    return str(path)


def test_needle_rows_are_kept(model, tmp_path, capsys):
    command = ["bench", "needle", "--kinds", "passkey", "--distances", "0.25,1"]
    command += ["--lengths", "128,256", "--samples", "2", "--choices", "2"]
    command += ["--window", "64", "--batch", "2", "--out", str(tmp_path)]
    command += ["--models", f"tiny={model}", "--note", "random"]
    assert cli.main(command) == 0
    found = json.loads((tmp_path / "needle.json").read_text())
    assert found["note"] == "random" and found["choices"] == 2
    places = [(row["model"], row["length"], row["distance"]) for row in found["rows"]]
    assert places == [("tiny", 128, 16), ("tiny", 256, 16), ("tiny", 256, 64)]
    assert (tmp_path / "needle.png").exists()
    capsys.readouterr()
    command[command.index(f"tiny={model}")] = "tiny=gone"
    assert cli.main(command) == 1, "a model that is not there"
    command[command.index("--choices") + 1] = "3"
    assert cli.main(command) == 1
    assert "expected results with choices 3, got 2" in capsys.readouterr().err


def test_examples_are_read_once(model, tmp_path):
    command = ["bench", "few_shot", "--model", model, "--examples", "120"]
    command += ["--questions", "3", "--batch", "2", "--repeats", "1"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "few_shot.json").read_text())
    once, again = found["rows"]
    assert again["tokens_read"] == 3 * 4 * (121 + 20 + 4 - 1)
    assert once["tokens_read"] == 121 + 3 * 19 + 3 * 4 * 4
    assert found["largest_difference_nats"] < few_shot.TOLERANCE
    assert once["times_less"] > 0 and again["times_less"] == 1
