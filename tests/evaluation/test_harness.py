"""Our models in lm-evaluation-harness, on tasks that need no network."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval")
# These read their caches' places when they are imported.
os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}

import lm_eval
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from recurrentgemma.checkpoints import load, save
from recurrentgemma.evaluation import harness_runs, model_cards
from recurrentgemma.evaluation.answer_cache import AnswerCache
from recurrentgemma.evaluation.harness import NAME, GriffinLM, register
from recurrentgemma.evaluation.long_suite import SUITES
from recurrentgemma.evaluation.scorer import LogLikelihood, Scorer
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from tests.models import random_model, tiny_config

ROOT = Path(__file__).parents[2]
TASKS = Path(__file__).parent / "harness_tasks"
TOLERANCE = {"rel": 1e-5, "abs": 1e-5}


@pytest.fixture(scope="module")
def tokenizer():
    return load("nano")[1]


@pytest.fixture(scope="module")
def sampler(tokenizer):
    config = tiny_config(
        vocab_size=tokenizer.vocab_size,
        block_pattern=("recurrent", "local_attention"),
        num_layers=2,
    )
    return Sampler(random_model(config), tokenizer, compile_ahead=False)


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASKS), include_defaults=False)


def lines(name):
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def evaluate(lm, manager, tasks=("toy",), **settings):
    return harness_runs.run_tasks(lm, list(tasks), manager=manager, **settings)


class Knowing(Scorer):
    """Knows the answers by heart, but for each `wrong`-th; bytes are uniform to it."""

    wrong = 10**9

    def _tail(self, tokens):
        return self.tokenizer.decode(tokens).rpartition("Q")[2]

    def log_likelihoods(self, requests):
        known = {row["question"]: row for row in lines("choice_test.jsonl")}
        for i, (context, tokens) in enumerate(requests):
            asked = self._tail(context)
            row = [row for question, row in known.items() if question in asked]
            text = self.tokenizer.decode(tokens)
            if not row:
                size = len(self.tokenizer.decode(tokens).encode())
                yield i, LogLikelihood(-size * math.log(256), False)
                continue
            number = list(known.values()).index(row[0])
            is_right = text.strip() == row[0]["choices"][row[0]["answer"]]
            is_right ^= number % self.wrong == self.wrong - 1
            yield i, LogLikelihood(-1.0 if is_right else -100.0, is_right)

    def texts(self, requests):
        known = {row["question"]: row["answer"] for row in lines("text_test.jsonl")}
        for i, request in enumerate(requests):
            asked = self._tail(request.context)
            yield i, next(f" {a}" for question, a in known.items() if question in asked)


def test_scores_that_are_known_in_advance(sampler, manager):
    results = evaluate(GriffinLM(Knowing(sampler)), manager)["results"]
    assert results["toy_choice"]["acc,none"] == 1.0
    assert results["toy_choice"]["acc_norm,none"] == 1.0
    assert results["toy_text"]["exact_match,number"] == 1.0
    assert results["toy_documents"]["bits_per_byte,none"] == pytest.approx(
        8.0, abs=1e-9
    )
    assert results["toy_documents"]["byte_perplexity,none"] == pytest.approx(256)
    scorer = Knowing(sampler)
    scorer.wrong = 3
    results = evaluate(GriffinLM(scorer), manager, ["toy_choice"])["results"]
    assert results["toy_choice"]["acc,none"] == pytest.approx(4 / 6)


@pytest.fixture(scope="module")
def results(sampler, manager):
    return evaluate(GriffinLM(Scorer(sampler, batch_size=4), max_length=64), manager)


def test_results_are_those_of_an_independent_computation(sampler, results):
    shots = [
        f"Question: {row['question']}\nAnswer: {row['choices'][row['answer']]}\n\n"
        for row in lines("choice_train.jsonl")
    ]
    correct = []
    for row in lines("choice_test.jsonl"):
        prompt = "".join(shots) + f"Question: {row['question']}\nAnswer:"
        start = len(sampler.tokenizer.encode(prompt)) - 1
        found = []
        for choice in row["choices"]:
            # The harness joins the context's tokens and those behind so many.
            whole = sampler.tokenizer.encode(prompt)
            whole += sampler.tokenizer.encode(f"{prompt} {choice}")[start + 1 :]
            # As the harness cuts what is too long, from the left.
            tail = whole[-65:]
            cut = len(whole) - len(tail)
            found.append(np.sum(sampler.score(tail).log_probs[start - cut :]))
        correct.append(int(np.argmax(found)) == row["answer"])
        logged = next(
            sample["resps"]
            for sample in results["samples"]["toy_choice"]
            if sample["doc"]["question"] == row["question"]
        )
        assert [one[0][0] for one in logged] == pytest.approx(found, **TOLERANCE)
    assert results["results"]["toy_choice"]["acc,none"] == np.mean(correct)

    shots = [
        f"Q: {r['question']}\nA: {r['answer']}\n\n" for r in lines("text_train.jsonl")
    ]
    for row in lines("text_test.jsonl"):
        prompt = sampler.tokenizer.encode("".join(shots) + f"Q: {row['question']}\nA:")
        [sample] = sampler(
            [prompt[-(64 - 12) :]],
            max_new_tokens=12,
            sampling=Sampling(0),
            stop=["\n"],
        )
        logged = next(
            one["resps"][0][0]
            for one in results["samples"]["toy_text"]
            if one["doc"]["question"] == row["question"]
        )
        assert logged == sample.text

    bits, size = 0.0, 0
    for row in lines("documents.jsonl"):
        tokens = sampler.tokenizer.encode(row["text"], add_bos=False)
        # Windows of 64 tokens, each after its last token before, from an empty state.
        for start in range(0, len(tokens), 64):
            window = tokens[start : start + 64]
            before = tokens[start - 1] if start else sampler.tokenizer.bos_id
            first = max(0, start + len(window) - 65)
            context = tokens[first:start] if start else [before]
            log_probs = sampler.score([*context, *window]).log_probs
            bits -= np.sum(log_probs[-len(window) :]) / math.log(2)
        size += len(row["text"].encode())
    found = results["results"]["toy_documents"]["bits_per_byte,none"]
    assert found == pytest.approx(bits / size, **TOLERANCE)


def test_batch_size_order_and_cache_do_not_matter(sampler, manager, results, tmp_path):
    def same(other):
        for task, row in results["results"].items():
            for metric, value in row.items():
                if isinstance(value, float):
                    assert other["results"][task][metric] == pytest.approx(value)

    same(evaluate(GriffinLM(Scorer(sampler, batch_size=1), max_length=64), manager))
    alone = [
        evaluate(
            GriffinLM(Scorer(sampler, batch_size=4), max_length=64), manager, [task]
        )
        for task in ("toy_documents", "toy_text", "toy_choice")
    ]
    same({"results": {k: v for one in alone for k, v in one["results"].items()}})

    class Interrupted(Scorer):
        def log_likelihoods(self, requests):
            for i, answer in enumerate(super().log_likelihoods(requests)):
                if i == 6:
                    raise KeyboardInterrupt
                yield answer

    path = tmp_path / "answers.jsonl"
    with AnswerCache(path) as cache, pytest.raises(KeyboardInterrupt):
        scorer = Interrupted(sampler, batch_size=4, cache=cache)
        evaluate(GriffinLM(scorer, max_length=64), manager)
    with AnswerCache(path) as cache:
        known = len(cache)
        assert known >= 6
        scorer = Scorer(sampler, batch_size=4, cache=cache)
        same(evaluate(GriffinLM(scorer, max_length=64), manager))
        assert len(cache) > known
        again = Scorer(sampler, batch_size=4, cache=cache)
        same(evaluate(GriffinLM(again, max_length=64), manager))
        assert again.tokens_read == 0


def test_the_harness_s_own_cache_is_filled(sampler, manager, results, tmp_path):
    found = []
    for _ in range(2):
        scorer = Scorer(sampler, batch_size=4)
        found.append(
            lm_eval.simple_evaluate(
                model=GriffinLM(scorer, max_length=64),
                tasks=["toy"],
                task_manager=manager,
                bootstrap_iters=0,
                use_cache=str(tmp_path / "cache"),
            )
        )
    assert scorer.tokens_read == 0, "read again"
    for one in found:
        assert one["results"] == results["results"]


def test_documents_may_be_read_whole(sampler, manager):
    lm = GriffinLM(Scorer(sampler), max_length=64, carry_state=True)
    found = evaluate(lm, manager, ["toy_documents"])["results"]["toy_documents"]
    texts = [row["text"] for row in lines("documents.jsonl")]
    bits = sum(sampler.score(text).bits_per_byte * len(text.encode()) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte,none"] == pytest.approx(bits / size, **TOLERANCE)


def test_the_model_is_found_by_name_beside_the_harness_s_own(
    sampler, tokenizer, manager, results, tmp_path
):
    register()
    register()
    assert {NAME, "hf", "dummy"} <= set(model_registry)
    save(tmp_path / "model", sampler.model, tokenizer)
    found = lm_eval.simple_evaluate(
        model=NAME,
        model_args={"model": str(tmp_path / "model"), "max_length": 64},
        tasks=["toy_choice"],
        task_manager=manager,
        bootstrap_iters=0,
        batch_size="4",
    )
    expected = results["results"]["toy_choice"]["acc,none"]
    assert found["results"]["toy_choice"]["acc,none"] == expected
    assert found["config"]["max_length"] == 64
    with pytest.raises(ValueError, match="model: expected a name or a Scorer"):
        GriffinLM(3)


def test_chat_template(sampler, tokenizer, manager):
    lm = GriffinLM(Scorer(sampler))
    turn = {"role": "user", "content": "Hi <b>there</b>"}
    text = lm.apply_chat_template([turn])
    assert lm.tok_encode(text) == tokenizer.format_turn(turn["content"])
    system = {"role": "system", "content": "Be brief."}
    with_system = lm.apply_chat_template([system, turn])
    assert lm.tok_encode(with_system) == tokenizer.format_turn(
        "Be brief.\n\nHi <b>there</b>"
    )
    answer = {"role": "assistant", "content": "Well"}
    open_ended = lm.apply_chat_template([turn, answer], add_generation_prompt=False)
    assert open_ended.endswith("<start_of_turn>model\nWell")
    plain = "<start_of_turn>user"
    assert lm.tok_encode(plain) == tokenizer.encode(plain), "not in a plain text"
    assert lm.tok_encode(plain, add_special_tokens=False)[0] != tokenizer.bos_id
    found = evaluate(lm, manager, ["toy_choice", "toy_text"], chat_template=True)
    [first, *_] = found["samples"]["toy_text"]
    prompt = first["arguments"][0][0]
    assert prompt.count("<start_of_turn>user\n") == 4 and prompt.startswith("<bos>")


def test_settings_of_a_text(sampler):
    lm = GriffinLM(Scorer(sampler), max_length=40)
    request = lm._text("a " * 100, {"until": ["\n", ""], "max_gen_toks": 10})
    assert request.stop == ("\n",) and request.sampling == Sampling(0)
    assert len(request.context) == 30
    drawn = lm._text(
        "a", {"until": "\n", "do_sample": True, "temperature": 0.7, "top_k": 5}
    )
    assert drawn.sampling == Sampling(0.7, top_k=5)
    with pytest.raises(
        ValueError, match="generation_kwargs: expected .* got typical_p"
    ):
        lm._text("a", {"until": [], "typical_p": 0.5})


def test_an_unknown_task_is_told(sampler, manager):
    with pytest.raises(ValueError, match="got 'toy_choise'; like it are toy_choice"):
        evaluate(GriffinLM(Scorer(sampler)), manager, ["toy_choise"])
    with pytest.raises(ValueError, match="include_path: expected a folder"):
        harness_runs.task_manager("nowhere")


def test_examples_of_a_task_with_one_split(sampler, manager, monkeypatch):
    """A document is never among its own examples."""
    monkeypatch.setitem(model_cards._FEWSHOT_SPLITS, "toy_test_only", "test")
    [figure] = [f for f in model_cards.figures("gemma-2b-it") if f.task == "bbq_ambig"]
    fields = {"task": "toy_test_only", "num_fewshot": 3}
    figure = model_cards.dataclasses.replace(figure, **fields)
    lm = GriffinLM(Knowing(sampler))
    ours, results = harness_runs.run_figure(lm, figure, manager=manager)
    assert ours == 100.0
    [samples] = results["samples"].values()
    for sample in samples:
        prompt = sample["arguments"][0][0]
        assert prompt.count("Question:") == 4
        assert prompt.count(sample["doc"]["question"]) == 1


@pytest.fixture(scope="module")
def everything():
    return harness_runs.task_manager()


def test_suites_and_cards_name_tasks_of_the_harness(everything):
    names = {task for suite in SUITES.values() for run in suite for task in run.tasks}
    names |= {figure.task for figure in model_cards.figures() if figure.task}
    for name in names:
        harness_runs.check_task(name, everything)


def config_of(manager, name):
    """The YAML of a task, or of the first task of a group or tag."""
    entry = manager._index[name]
    if entry.kind is Kind.TAG:
        return config_of(manager, min(entry.tags))
    config = load_yaml(entry.yaml_path, resolve_func=False)
    if "task" in config and isinstance(config["task"], list):
        member = config["task"][0]
        return config_of(manager, member if isinstance(member, str) else member["task"])
    return config


def test_cards_name_metrics_and_filters_that_the_tasks_have(everything):
    for figure in model_cards.figures():
        if figure.match not in ("direct", "setting assumed"):
            continue
        config = config_of(everything, figure.task)
        metric, name = figure.metric.split(",")
        metrics = [str(one["metric"]) for one in config.get("metric_list", [])]
        known = [
            m for m in metrics if metric in m or (metric == "pass@1" and "pass" in m)
        ]
        assert known or metric in ("acc", "acc_norm"), (figure, metrics)
        filters = [one["name"] for one in config.get("filter_list", [])] or ["none"]
        assert name in filters, (figure.task, filters)
        # The harness keeps a task's 0 against the caller's number of examples.
        if config.get("num_fewshot") == 0:
            assert figure.num_fewshot in (0, None), figure


def test_a_card_beside_ours(sampler, everything, monkeypatch):
    asked = []

    def run_tasks(lm, tasks, *, num_fewshot, **_):
        asked.append((tasks, num_fewshot))
        if tasks == ["minerva_math"]:  # a tag: two tasks of it
            rows = {"a": {"exact_match,none": 0.1}, "b": {"exact_match,none": 0.4}}
            counts = {"a": {"effective": 2}, "b": {"effective": 1}}
            return {"results": rows, "n-samples": counts}
        if tasks == ["piqa"]:
            raise ConnectionError("no network")
        names = ("acc,none", "acc_norm,none", "exact_match,remove_whitespace")
        return {"results": {tasks[0]: dict.fromkeys(names, 0.5)}, "n-samples": {}}

    monkeypatch.setattr(harness_runs, "run_tasks", run_tasks)
    monkeypatch.setattr(harness_runs, "_missing_packages", lambda figure: [])
    lm = GriffinLM(Scorer(sampler))
    rows = list(harness_runs.run_card(lm, "recurrentgemma-2b"))
    assert len(rows) == 29
    ours = {row["benchmark"]: row for row in rows if "ours" in row}
    assert ours.keys() == {
        *("MMLU", "HellaSwag", "SocialIQA", "BoolQ", "CommonsenseQA", "TriviaQA"),
        *("Natural Questions", "MATH"),
    }
    assert ours["MMLU"]["difference"] == pytest.approx(50 - 38.4)
    assert ours["MATH"]["ours"] == pytest.approx(20.0)
    assert (["mmlu"], 5) in asked and (["hellaswag"], 0) in asked
    reasons = {row["benchmark"]: row["reason"] for row in rows if "reason" in row}
    assert "no network" in reasons["PIQA"]
    assert "--run-generated-code" in reasons["HumanEval"]
    assert "leaves the setting open" in reasons["GSM8K"]
    assert "no task" in reasons["BOLD"] and reasons["Average"]


def test_a_run_of_a_suite_that_cannot_be_done_says_why(sampler, monkeypatch):
    seen = []

    def run_tasks(lm, tasks, *, manager, **_):
        seen.append((tasks, lm.max_length, manager.metadata))
        if tasks == ("longbench",):
            raise ValueError("nothing here")
        return {"results": {}}

    monkeypatch.setattr(harness_runs, "run_tasks", run_tasks)
    monkeypatch.setattr(
        harness_runs,
        "task_manager",
        lambda metadata: TaskManager(include_defaults=False, metadata=metadata),
    )
    lm = GriffinLM(Scorer(sampler), max_length=64)
    found = dict(harness_runs.run_suite(lm, "long"))
    assert list(found) == [run.name for run in SUITES["long"]] and lm.max_length == 64
    assert found["longbench"] == {"error": "ValueError: nothing here"}
    lengths = {tasks[0]: (length, metadata) for tasks, length, metadata in seen}
    length, metadata = lengths["ruler"]
    assert max(metadata["max_seq_lengths"]) < length and metadata["tokenizer"]
    assert lengths["fda"][1] == {}
    with pytest.raises(ValueError, match="suite: expected one of long"):
        next(harness_runs.run_suite(lm, "short"))


def test_the_suite_s_tokenizer_opens_in_transformers(sampler, monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    from recurrentgemma.checkpoints.transformers_tokenizer import write_tokenizer_files

    write_tokenizer_files(tmp_path, sampler.tokenizer)
    opened = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "Some special magic numbers"
    assert opened(text).input_ids == sampler.tokenizer.encode(text)


def test_torch_and_transformers_are_not_needed():
    source = f"""
import sys

class Without:  # as if neither were installed
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *others):
        if name.split(".")[0] not in ("torch", "transformers"):
            return self.finder.find_spec(name, *others)

sys.meta_path[:] = map(Without, sys.meta_path)
import lm_eval
from lm_eval.tasks import TaskManager
from recurrentgemma.evaluation.harness import GriffinLM
manager = TaskManager(include_path={str(TASKS)!r}, include_defaults=False)
lm = GriffinLM("nano", batch_size=2)
tasks = ["toy_choice", "toy_text", "toy_documents"]
found = lm_eval.simple_evaluate(
    model=lm, tasks=tasks, task_manager=manager, limit=1, bootstrap_iters=0
)
print(*found["results"])
"""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "toy_documents" in done.stdout


def test_the_command_without_the_extra_says_what_to_install(monkeypatch, capsys):
    from recurrentgemma import cli

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "lm_eval" else find(name),
    )
    assert cli.main(["eval", "--card", "recurrentgemma-2b"]) == 1
    assert "pip install 'recurrentgemma[eval]'" in capsys.readouterr().err
