"""The command `eval`: what it prints and writes, and its mistakes."""

import json

import pytest

from recurrentgemma import cli
from recurrentgemma.checkpoints import load, save
from recurrentgemma.commands import eval as command
from recurrentgemma.evaluation.model_cards import cards
from recurrentgemma.generation.sampler import Sampler
from tests.models import random_model, tiny_config


@pytest.fixture(scope="module")
def sampler():
    tokenizer = load("nano")[1]
    config = tiny_config(
        vocab_size=tokenizer.vocab_size, num_layers=1, attention_window=32
    )
    return Sampler(random_model(config), tokenizer)


@pytest.fixture(scope="module")
def model(sampler, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "model"
    save(path, sampler.model, sampler.tokenizer)
    return str(path)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"prompt": f"{n} + 1 =", "choices": [" 1", f" {n + 1}"], "answer": 1}
        for n in range(1, 6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files(model, sampler, questions, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 9)
    output, cache = tmp_path / "results.json", tmp_path / "answers.jsonl"
    arguments = [
        "eval",
        str(questions),
        str(text),
        "--model",
        model,
        "--batch-size",
        "2",
    ]
    arguments += ["--cache", str(cache), "--output", str(output)]
    arguments += ["--examples", str(questions), "--num-examples", "2"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{questions}  items 5  accuracy ")
    found = json.loads(output.read_text())
    score = sampler.score(iter(text.read_text().splitlines(keepends=True)))
    figures = found["files"][str(text)]
    assert figures["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-4)
    assert figures["perplexity"] == pytest.approx(score.perplexity, rel=1e-4)
    rows = found["files"][str(questions)]["rows"]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5]
    assert found["settings"]["num-examples"] == 2 and found["versions"]["jax"]
    assert found["tokens_read"] > 0
    assert cli.main(arguments) == 0
    again = json.loads(output.read_text())
    assert again["tokens_read"] == 0, "asked again"
    assert again["files"] == found["files"]


def test_needle(model, tmp_path, capsys):
    output = tmp_path / "needle.json"
    arguments = ["eval", "--model", model, "--needle", "passkey", "--lengths", "200,1k"]
    arguments += ["--distances", "1", "--samples", "2", "--choices", "2"]
    assert cli.main([*arguments, "--output", str(output)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == [
        *("kind", "length", "windows", "accuracy", "generated", "gain")
    ]
    found = json.loads(output.read_text())
    assert found["window"] == 32
    assert [(row["length"], row["distance"]) for row in found["rows"]] == [
        (200, 32),
        (1024, 32),
    ]
    assert len(shown) == 3


@pytest.mark.parametrize(
    ("flags", "status", "match"),
    [
        ([], 2, "expected files or one of --needle"),
        (
            ["--needle", "passkey", "--tasks", "mmlu"],
            2,
            "got 0 files and needle, tasks",
        ),
        (["missing.jsonl"], 1, "there is no file missing.jsonl"),
        (["--needle", "hay"], 1, "kinds: expected one of passkey"),
        (["--needle", "needle", "--lengths", "x"], 1, "--lengths: expected numbers"),
        (
            ["--needle", "needle", "--distances", "x"],
            2,
            "--distances: expected numbers",
        ),
        (["--suite", "short"], 1, "--suite: expected one of long"),
        (["--card", "gpt"], 1, "card: expected one of recurrentgemma-2b"),
    ],
)
def test_mistakes(flags, status, match, capsys):
    assert cli.main(["eval", *flags]) == status
    assert match in capsys.readouterr().err


@pytest.mark.parametrize(("number", "lines"), [(None, 5), (2, 2), (0, 0)])
def test_number_of_examples(questions, number, lines):
    found = command.examples_of({"examples": str(questions), "num-examples": number})
    assert [item.line for item in found] == list(range(1, lines + 1))


def test_a_bad_line_is_told_before_the_model_is_loaded(questions, capsys):
    with questions.open("a") as file:
        file.write("{\n")
    assert cli.main(["eval", str(questions), "--model", "missing"]) == 1
    assert "questions.jsonl, line 6: Expecting" in capsys.readouterr().err


def test_a_card_is_printed_beside_ours(model, monkeypatch, capsys, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from recurrentgemma.evaluation import harness_runs

    row = {"benchmark": "MMLU", "setting": "5-shot", "card": 38.4, "task": "mmlu"}
    rows = [
        row | {"ours": 40.0, "difference": 1.6, "results": {"versions": {"mmlu": 2}}},
        row | {"benchmark": "BOLD", "reason": "no task"},
    ]
    monkeypatch.setattr(harness_runs, "run_card", lambda *_, **__: iter(rows))
    output = tmp_path / "card.json"
    arguments = ["eval", "--model", model, "--card", "recurrentgemma-2b"]
    assert cli.main([*arguments, "--output", str(output)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["MMLU", "5-shot", "38.4", "40.0", "+1.6"]
    assert shown[-1].split(maxsplit=3) == ["BOLD", "5-shot", "38.4", "no task"]
    found = json.loads(output.read_text())
    assert found["rows"][0]["results"]["versions"] == {"mmlu": 2}
    assert found["source"] == cards()["recurrentgemma-2b"]["source"]
    assert found["lm_eval"]


def test_the_harness_s_tasks_are_run(model, capsys, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from pathlib import Path

    tasks = Path(__file__).parent / "harness_tasks"
    output = tmp_path / "tasks.json"
    arguments = ["eval", "--model", model, "--tasks", "toy_choice", "--limit", "2"]
    arguments += ["--include-path", str(tasks), "--output", str(output)]
    assert cli.main(arguments) == 0
    assert "acc,none" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert "Question: " in found["configs"]["toy_choice"]["doc_to_text"]
    assert found["versions"]["toy_choice"] == 1.0 and found["settings"]["limit"] == 2
    assert cli.main([*arguments, "--tasks", "toy_choise"]) == 1
    assert "like it are toy_choice" in capsys.readouterr().err
