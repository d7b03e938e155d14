"""`recurrentgemma eval`: what a model knows, by its own evaluator or the harness's."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from recurrentgemma import _validation as check
from recurrentgemma.commands import UsageError, _shared

if TYPE_CHECKING:
    from recurrentgemma.evaluation.scorer import Scorer
    from recurrentgemma.evaluation.tasks import Item

USAGE = "[FILE ...] [FLAGS]"
DETAILS = (
    "Evaluates a model on files, on needles in long texts (--needle), on tasks of "
    "lm-evaluation-harness (--tasks, --suite), or beside a model card (--card); the last "
    "two need the extra `eval`. A FILE that ends in .jsonl holds questions: {prompt, "
    "choices, answer} or {prompt, answer}; of any other the perplexity is shown. With "
    "--cache, the same command goes on where it was interrupted."
)
MODES = ("needle", "tasks", "suite", "card")
JSONL = ".jsonl"

_TEXTS = (
    ("examples", None, "JSONL file of questions that come before every prompt"),
    ("introduction", "", "text at the very beginning of every prompt"),
    ("match", "exact", "how texts are compared: exact, start, contains or number"),
    ("needle", None, "kinds with commas: needle, multi_needle, passkey, code"),
    ("lengths", "512,1024,2048,4096", "tokens of the prompts with needles"),
    ("distances", "0.25,0.5,1.5,3,6,12", "windows between needle and question"),
    ("file", None, "hide needles in the text of this file"),
    ("tasks", None, "names of the harness's tasks, with commas between them"),
    ("include-path", None, "folder with more tasks of the harness (YAML)"),
    ("suite", None, "tasks with fixed settings: long"),
    ("card", None, "model card to compare with, such as recurrentgemma-2b"),
    ("cache", None, "file of answers, to go on from"),
    ("output", None, "write results, settings and versions to this file (JSON)"),
)
_NUMBERS = (
    ("batch-size", 8, "rows at a time; changes no result"),
    ("num-examples", None, "examples before a prompt; by default all, or the task's"),
    ("limit", None, "most questions of a task"),
    ("max-new-tokens", 256, "most tokens of a generated answer"),
    ("samples", 10, "prompts with a needle for each length and distance"),
    ("choices", 10, "numbers that a model chooses among"),
    ("max-length", None, "most tokens of the harness's texts (default: 8192)"),
)
_SWITCHES = (
    ("chat-template", "ask as a user's turn (instruction-tuned models)"),
    ("carry-state", "read documents of the harness whole, not in windows"),
    ("assumed", "also measure figures whose setting the card leaves open"),
    ("run-generated-code", "run code that the model writes (HumanEval, MBPP)"),
)


def define_flags(values: flags.FlagValues) -> None:
    _shared.define_model(values)
    _shared.define_variant(values)
    for name, default, what in _TEXTS:
        flags.DEFINE_string(name, default, what, flag_values=values)
    for name, default, what in _NUMBERS:
        lower = 0 if name == "num-examples" else 1
        flags.DEFINE_integer(name, default, what, lower_bound=lower, flag_values=values)
    for name, what in _SWITCHES:
        flags.DEFINE_boolean(name, False, what, flag_values=values)
    flags.DEFINE_multi_string(
        "stop", None, "end a generated answer before this", flag_values=values
    )


def run(values: dict[str, Any], arguments: list[str]) -> None:
    chosen = [mode for mode in MODES if values[mode] is not None]
    if len(chosen) + bool(arguments) != 1:
        shown = ", ".join(f"--{mode}" for mode in MODES)
        raise UsageError(
            f"expected files or one of {shown}, got "
            f"{len(arguments)} files and {', '.join(chosen) or 'none of them'}"
        )
    for path in (*arguments, *filter(None, (values["examples"], values["file"]))):
        _shared.check_file("FILE", path)
    if values["output"] is not None:
        _shared.check_target("--output", values["output"])
    evaluations = {"needle": _needle, "tasks": _tasks, "suite": _suite, "card": _card}
    evaluate = evaluations[chosen[0]] if chosen else _files

    from recurrentgemma.evaluation.answer_cache import AnswerCache

    with AnswerCache(values["cache"]) as cache:
        document = evaluate(values, arguments, cache)
    if values["output"] is not None:
        _write(Path(values["output"]), values, document)


def _scorer(values: dict[str, Any], cache: Any) -> "Scorer":
    from recurrentgemma.evaluation.scorer import Scorer

    sampler, _ = _shared.load_sampler(values)
    return Scorer(sampler, batch_size=values["batch-size"], cache=cache)


def _files(values: dict[str, Any], paths: list[str], cache: Any) -> dict[str, Any]:
    from recurrentgemma.evaluation import tasks
    from recurrentgemma.evaluation.perplexity import TextFigures

    items = {
        path: tasks.read_items(path, values["limit"])
        for path in paths
        if path.endswith(JSONL)
    }
    settings = tasks.TaskSettings(
        examples=examples_of(values),
        introduction=values["introduction"],
        max_new_tokens=values["max-new-tokens"],
        stop=tuple(values["stop"] or tasks.TaskSettings.stop),
        match=values["match"],
    )
    scorer = _scorer(values, cache)
    found = {}
    for path in paths:
        if path in items:
            rows = tasks.evaluate(scorer, items[path], settings)
            found[path] = tasks.accuracy(rows) | {"rows": rows}
        else:
            totals = TextFigures()
            for score in scorer.sampler.score_stream(_shared.lines_of_file(path)):
                totals = totals.add(score)
            found[path] = {
                "tokens": totals.tokens,
                "bytes": totals.bytes,
                "perplexity": totals.perplexity,
                "bits_per_byte": totals.bits_per_byte,
            }
        shown = {name: x for name, x in found[path].items() if name != "rows"}
        print(path, *(f"{name} {x:,.6g}" for name, x in shown.items()), sep="  ")
    return {"files": found, "tokens_read": scorer.tokens_read}


def examples_of(values: dict[str, Any]) -> "tuple[Item, ...]":
    """The items that stand before every prompt."""
    from recurrentgemma.evaluation.tasks import read_items

    if values["examples"] is None:
        return ()
    return tuple(read_items(values["examples"])[: values["num-examples"]])


def _needle(values: dict[str, Any], _: list[str], cache: Any) -> dict[str, Any]:
    from recurrentgemma.benchmarks.sweep import counts
    from recurrentgemma.evaluation import needle, retrieval_heads

    settings: dict[str, Any] = {
        "kinds": tuple(values["needle"].split(",")),
        "lengths": tuple(counts("lengths", values["lengths"].split(","))),
        "distances": _shared.numbers("distances", values["distances"], float),
        "samples": values["samples"],
        "choices": values["choices"],
    }
    needle.NeedleSettings(**settings)  # before the model is loaded
    if values["file"] is None:
        text = retrieval_heads.bundled_text()
    else:
        text = "".join(_shared.lines_of_file(values["file"]))
    scorer = _scorer(values, cache)
    window = scorer.sampler.model.config.attention_window
    asked = needle.NeedleSettings(**settings, window=window)
    print(
        f"{'kind':13} {'length':>8} {'windows':>8} {'accuracy':>9} {'generated':>9}  gain"
    )
    rows = []
    for row in needle.measure(scorer, text, asked):
        rows.append(row)
        print(
            f"{row['kind']:13} {row['length']:8,} {row['windows']:8.4g} "
            f"{row['accuracy']:9.2f} {row['generated']:9.2f}  {row['gain']:+.3f}",
            flush=True,
        )
    return {"window": window, "rows": rows}


def _check_harness() -> None:
    """Raises ValueError if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "lm_eval: expected lm-evaluation-harness to be installed, got no such "
            "package; pip install 'recurrentgemma[eval]'"
        )


def _harness(values: dict[str, Any], cache: Any) -> Any:
    """The model as the harness calls it."""
    from recurrentgemma.evaluation import harness

    more = {} if values["max-length"] is None else {"max_length": values["max-length"]}
    scorer = _scorer(values, cache)
    return harness.GriffinLM(scorer, carry_state=values["carry-state"], **more)


def _tasks(values: dict[str, Any], _: list[str], cache: Any) -> dict[str, Any]:
    _check_harness()
    from recurrentgemma.evaluation import harness_runs

    names = values["tasks"].split(",")
    manager = harness_runs.task_manager(values["include-path"])
    for name in names:
        harness_runs.check_task(name, manager)
    results = harness_runs.run_tasks(
        _harness(values, cache),
        names,
        manager=manager,
        num_fewshot=values["num-examples"],
        limit=values["limit"],
        chat_template=values["chat-template"],
        run_generated_code=values["run-generated-code"],
    )
    _show_results(results)
    return results | {"lm_eval": harness_runs.harness_version()}


def _suite(values: dict[str, Any], _: list[str], cache: Any) -> dict[str, Any]:
    from recurrentgemma.evaluation.long_suite import SUITES

    check.choice("--suite", values["suite"], SUITES)
    _check_harness()
    from recurrentgemma.evaluation import harness_runs

    found = {}
    lm = _harness(values, cache)
    runs = harness_runs.run_suite(lm, values["suite"], limit=values["limit"])
    for name, results in runs:
        found[name] = results
        print(name)
        if "error" in results:
            print(f"  not run: {results['error']}")
        else:
            _show_results(results)
    return {"runs": found, "lm_eval": harness_runs.harness_version()}


def _show_results(results: dict[str, Any]) -> None:
    for task, row in results["results"].items():
        for metric, value in row.items():
            if isinstance(value, float) and "stderr" not in metric:
                print(f"  {task:32} {metric:32} {value:.4f}", flush=True)


def _card(values: dict[str, Any], _: list[str], cache: Any) -> dict[str, Any]:
    from recurrentgemma.evaluation import model_cards

    model_cards.figures(values["card"])  # before the model is loaded
    _check_harness()
    from recurrentgemma.evaluation import harness_runs

    found = harness_runs.run_card(
        _harness(values, cache),
        values["card"],
        limit=values["limit"],
        assumed=values["assumed"],
        run_generated_code=values["run-generated-code"],
    )
    print(f"{'benchmark':18} {'setting':16} {'card':>6} {'ours':>6} {'difference':>10}")
    rows, others = [], []
    for row in found:
        if "reason" in row:
            others.append(row)
            continue
        rows.append(row)
        figures = f"{row['card']:6.1f} {row['ours']:6.1f} {row['difference']:+10.1f}"
        print(f"{row['benchmark']:18} {row['setting']:16} {figures}", flush=True)
    print("\nNot measured:" if others else "")
    for row in others:
        figures = f"{row['card']:6.1f}  {row['reason']}"
        print(f"{row['benchmark']:18} {row['setting']:16} {figures}")
    return {
        "card": values["card"],
        **model_cards.cards()[values["card"]],
        "lm_eval": harness_runs.harness_version(),
        "rows": rows,
        "not_measured": others,
    }


def _write(path: Path, values: dict[str, Any], document: dict[str, Any]) -> None:
    from recurrentgemma import __version__
    from recurrentgemma._atomic import replace_file
    from recurrentgemma.benchmarks.report import provenance

    settings = {name: values[name] for name, *_ in (*_TEXTS, *_NUMBERS, *_SWITCHES)}
    whole = provenance() | {
        "recurrentgemma": __version__,
        "model": values["model"],
        "settings": settings | {"stop": values["stop"]},
        **document,
    }
    with replace_file(path) as partial:
        # The harness's configs hold functions, whose text says which.
        text = json.dumps(whole, indent=1, default=str)
        partial.write_text(text + "\n", encoding="utf-8")
