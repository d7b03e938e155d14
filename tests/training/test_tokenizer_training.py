"""The tokenizer's own training, on as little as one file."""

import pytest

from recurrentgemma import Tokenizer
from recurrentgemma.training import tokenizer_training
from recurrentgemma.training.corpus import Document, split_held_out


def test_one_file_is_enough(tmp_path, monkeypatch, capsys):
    words = [f"def function_{i}(argument):\n    return {i}\n" for i in range(40)]
    (tmp_path / "a.py").write_text("".join(words))
    output = tmp_path / "tokenizer.model"
    arguments = ["--data", tmp_path / "a.py", "--vocab-size", 320, "--output", output]
    monkeypatch.setattr("sys.argv", ["tokenizer_training", *map(str, arguments)])
    tokenizer_training.main()
    assert capsys.readouterr().out.endswith(" training bytes per token\n")
    assert Tokenizer(output).vocab_size == 320


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_some_document_is_always_trained_on(share):
    for name in map(str, range(20)):
        document = Document(name, "text")
        assert split_held_out([document], share) == ([document], [])
