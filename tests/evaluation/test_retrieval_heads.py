"""The study of retrieval heads: its prompts, its figures, its command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import cli
from recurrentgemma.checkpoints import load, save
from recurrentgemma.evaluation import retrieval_heads
from recurrentgemma.evaluation.retrieval_heads import Settings, make_prompts, study
from recurrentgemma.inspect import edit, keep_heads
from tests.models import forward, random_model, tiny_config

LENGTH = 90
SETTINGS = Settings(
    lengths=(LENGTH,), depths=(0.0, 1.0), samples=1, keep=(1,), each_head=True
)


@pytest.fixture(scope="module")
def tokenizer():
    return load("nano")[1]


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(
        tiny_config(
            vocab_size=tokenizer.vocab_size,
            block_pattern=("local_attention", "recurrent"),
            num_layers=2,
            attention_window=64,
        )
    )


@pytest.fixture(scope="module")
def text():
    return retrieval_heads.bundled_text()


@pytest.fixture(scope="module")
def rows(model, tokenizer, text):
    found = list(study(model, tokenizer, text, SETTINGS))
    return {(row["ablation"], row["phase"]): row for row in found}


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompts_have_the_needle_at_its_depth(tokenizer, text, depth):
    settings = Settings(depths=(depth,), samples=2)
    prompts = make_prompts(tokenizer, text, 300, settings)
    assert prompts.tokens.shape == (2, 300)
    assert prompts.tokens[:, 0].tolist() == [tokenizer.bos_id] * 2
    keys = set()
    for row, answer in zip(prompts.tokens, prompts.answers, strict=True):
        key = tokenizer.decode(answer).strip()
        keys.add(key)
        shown = tokenizer.decode(row[1:].tolist())
        before, after = shown.split(settings.needle.replace("{answer}", key))
        assert shown.rstrip(" ").endswith(settings.question)
        after = after.rstrip(" ").removesuffix(settings.question)
        assert abs(len(before) / len(before + after) - depth) < 0.03
        both = f"{settings.question} {key}"
        assert tokenizer.decode([*row[-30:].tolist(), *answer]).endswith(both)
        assert key.isdigit()
    assert len(keys) == 2


def _by_hand(reader, writer, prompts, row):
    """Sum of log-probabilities and greedy success, from calls of two models."""
    tokens = jnp.asarray(prompts.tokens[row : row + 1])
    answer = jnp.array([prompts.answers[row]])
    _, cache = forward(reader, tokens[:, :-1])
    fed = jnp.concatenate([tokens[:, -1:], answer[:, :-1]], axis=1)
    logits, _ = forward(writer, fed, None, cache)
    chosen = jax.nn.log_softmax(logits[0])[jnp.arange(answer.shape[1]), answer[0]]
    return float(chosen.sum()), bool((logits[0].argmax(-1) == answer[0]).all())


def _without_head(value):
    return value.at[:, :, 2].set(0.0)


@pytest.mark.parametrize(
    "case, reading, writing",
    [
        (("none", "none"), {}, {}),
        (("keep 1", "prompt"), {"*.probabilities": keep_heads(1)}, {}),
        (("without 0.2", "generated"), {}, {"*.heads": _without_head}),
    ],
)
def test_figures_equal_those_of_edited_models(
    model, tokenizer, text, rows, case, reading, writing
):
    models = (edit(model, edits) if edits else model for edits in (reading, writing))
    reader, writer = models
    prompts = make_prompts(tokenizer, text, LENGTH, SETTINGS)
    row = rows[case]
    for i, sample in enumerate(row["samples"]):
        log_prob, correct = _by_hand(reader, writer, prompts, i)
        assert abs(sample["log_prob"] - log_prob) < 1e-3
        assert sample["correct"] == correct
        assert sample["depth"] == SETTINGS.depths[i]
    total = sum(sample["log_prob"] for sample in row["samples"])
    tokens = sum(map(len, prompts.answers))
    assert row["log_prob"] == pytest.approx(total / tokens)


def test_every_ablation_is_measured_in_every_phase(rows):
    names = ["keep 1", *(f"without 0.{head}" for head in range(3))]
    expected = [(name, phase) for name in names for phase in retrieval_heads.PHASES]
    assert list(rows) == [("none", "none"), *expected]
    figures = [row["log_prob"] for row in rows.values()]
    assert len(set(np.round(figures, 5))) == len(figures)


def test_accuracy_counts_answers_whose_tokens_are_all_right(
    model, tokenizer, text, monkeypatch
):
    """What is behind the end of a shorter answer does not count."""
    prompts = make_prompts(tokenizer, text, LENGTH, SETTINGS)
    prompts = prompts._replace(answers=[[5, 6, 7], [5, 6]])
    right = np.array([[True, False, True], [True, True, False]])
    log_probs = np.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    monkeypatch.setattr(
        retrieval_heads, "_score_answer", lambda *_, **__: (log_probs, right)
    )
    reader = retrieval_heads._Reader(model, prompts, SETTINGS)
    none = retrieval_heads.Ablation("none", 3, np.ones((1, 3), np.float32))
    row = reader.row(none, "none", none, [None])
    assert (row["accuracy"], row["log_prob"]) == (0.5, -3.0)
    assert [sample["correct"] for sample in row["samples"]] == [False, True]


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"lengths": (20,)}, "lengths: expected at least .* tokens, which needle"),
        ({"lengths": (0,)}, "lengths: expected "),
        ({"depths": (1.5,)}, "depths: expected "),
        ({"keep": (3,)}, "keep: expected "),
        ({"needle": "no key"}, "needle: expected a sentence with {answer} in it"),
    ],
)
def test_settings_that_do_not_fit(model, tokenizer, text, fields, sentence):
    with pytest.raises(ValueError, match="^" + sentence):
        next(study(model, tokenizer, text, Settings(**fields)))


def test_a_model_without_attention(tokenizer, text):
    hawk = random_model(tiny_config(block_pattern=("recurrent",)))
    with pytest.raises(ValueError, match="^model: expected one with attention"):
        next(study(hawk, tokenizer, text, Settings()))


def test_the_command_prints_a_table_and_writes_a_document(
    model, tokenizer, rows, tmp_path, capsys
):
    save(tmp_path / "model", model, tokenizer)
    output = tmp_path / "heads.json"
    arguments = ["heads", "--model", tmp_path / "model", "--lengths", LENGTH]
    arguments += ["--depths", "0,1", "--samples", 1, "--keep", 1, "--each-head"]
    status = cli.main([*map(str, arguments), "--output", str(output)])
    shown = capsys.readouterr().out.splitlines()
    assert status == 0
    assert shown[0].split() == [
        *("tokens", "ablation", "phase", "accuracy", "log-prob.", "change")
    ]
    assert len(shown) == 1 + len(rows)
    document = json.loads(output.read_text())
    assert document["config"] == json.loads(json.dumps(model.config.to_dict()))
    assert document["settings"]["keep"] == [1]
    for row, expected in zip(document["rows"], rows.values(), strict=True):
        assert row["ablation"] == expected["ablation"]
        assert row["log_prob"] == pytest.approx(expected["log_prob"], abs=1e-4)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--lengths", "ten"], "--lengths: expected numbers with commas"),
        (["--lengths", ""], "lengths: expected"),
        (["--file", "missing.txt"], "--file: there is no file missing.txt"),
        (["text"], "expected no arguments, got 'text'"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, sentence, capsys):
    assert cli.main(["heads", *arguments]) != 0
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
