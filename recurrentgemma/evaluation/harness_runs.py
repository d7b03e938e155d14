"""Runs of lm-evaluation-harness: tasks by name, suites, the rows of a model card.

Every result says how it came about: the task's whole config (prompt, examples, stop
strings, metric), the harness's version, and the model's.
"""

# The extra `eval` is not among what the type checker needs.
# pyright: reportMissingImports=false

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from recurrentgemma import _validation as check
from recurrentgemma.checkpoints.transformers_tokenizer import write_tokenizer_files
from recurrentgemma.evaluation.harness import GriffinLM
from recurrentgemma.evaluation.long_suite import SUITES
from recurrentgemma.evaluation.model_cards import Figure, figures

Results = dict[str, Any]


def run_tasks(
    lm: GriffinLM,
    tasks: Sequence[str | dict[str, Any]],
    *,
    manager: TaskManager,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    run_generated_code: bool = False,
) -> Results:
    """The harness's results of tasks.

    Args:
      lm: the model.
      tasks: names of tasks or groups, or groups as `TaskManager.load` takes them.
      manager: knows the tasks.
      num_fewshot: number of examples; None takes each task's.
      limit: most documents of a task; None takes all.
      chat_template: whether prompts are turns of a conversation.
      run_generated_code: whether code that the model writes may be run here.

    Returns:
      `results` by task or group, `configs`, `versions`, `n-shot` and `n-samples` by
      task, and `samples` by task.

    Raises:
      ValueError: there is no such task, or it cannot be run here.
    """
    for name in tasks:
        if isinstance(name, str):
            check_task(name, manager)
    try:
        found = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            apply_chat_template=chat_template,
            confirm_run_unsafe_code=run_generated_code,
        )
    except (ImportError, ConnectionError) as error:
        names = ", ".join(str(name) for name in tasks)
        raise ValueError(
            f"tasks: expected what {names} needs to be here, got "
            f"{type(error).__name__}: {error}"
        ) from error
    assert found is not None
    parts = ("results", "groups", "configs", "versions", "n-shot", "n-samples")
    return {part: found.get(part, {}) for part in (*parts, "samples")}


def task_manager(
    include_path: str | None = None, metadata: dict[str, Any] | None = None
) -> TaskManager:
    """The harness's tasks and those of a folder; reading them takes seconds.

    Raises:
      ValueError: there is no such folder.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path: expected a folder, got {include_path}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=include_path, metadata=metadata)


def check_task(name: str, manager: TaskManager) -> None:
    """Raises ValueError, with names that are like it, unless there is such a task."""
    if name in manager.all_tasks or Path(name).is_file() or manager.match_tasks([name]):
        return
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    advice = f"; like it are {', '.join(near)}" if near else ""
    raise ValueError(f"tasks: expected a task of the harness, got {name!r}{advice}")


def run_suite(
    lm: GriffinLM, name: str, *, limit: int | None = None
) -> Iterator[tuple[str, Results]]:
    """The runs of a suite.

    Yields:
      The name of a run and its results, as they are found; `error` alone in place of
      those of a run whose data or packages are missing.

    Raises:
      ValueError: there is no such suite.
    """
    check.choice("suite", name, SUITES)
    with contextlib.ExitStack() as stack:
        folder = None
        for run in SUITES[name]:
            metadata = dict(run.metadata)
            before, lm.max_length = lm.max_length, run.max_length
            try:
                if run.needs_tokenizer:
                    if folder is None:
                        new = stack.enter_context(tempfile.TemporaryDirectory())
                        write_tokenizer_files(Path(new), lm.scorer.tokenizer)
                        folder = new
                    metadata["tokenizer"] = folder
                results = run_tasks(
                    lm,
                    run.tasks,
                    manager=task_manager(metadata=metadata),
                    num_fewshot=run.num_fewshot,
                    limit=limit,
                )
                yield run.name, results
            except (ValueError, OSError, RuntimeError) as error:
                yield run.name, {"error": f"{type(error).__name__}: {error}"}
            finally:
                lm.max_length = before


def run_figure(
    lm: GriffinLM,
    figure: Figure,
    *,
    manager: TaskManager,
    limit: int | None = None,
) -> tuple[float, Results]:
    """Our value of a figure of a model card, in the card's unit, and its results.

    Raises:
      ValueError: the task cannot be run here.
    """
    task: str | dict[str, Any] = figure.task
    if figure.fewshot_split is not None:
        # The harness leaves a document out of its own examples only where it knows that
        # they come from the split that is asked.
        override = {
            "task": figure.task,
            "num_fewshot": figure.num_fewshot,
            "fewshot_split": figure.fewshot_split,
        }
        task = {"group": f"card_{figure.task}", "task": [override]}
    results = run_tasks(
        lm,
        [task],
        manager=manager,
        num_fewshot=figure.num_fewshot,
        limit=limit,
        run_generated_code=figure.runs_code,
    )
    rows = results["results"]
    if figure.task not in rows:
        # A tag, whose tasks have no common result: the mean over their documents.
        rows = {figure.task: _mean(rows, results["n-samples"], figure.metric)}
    if figure.metric not in rows[figure.task]:
        raise ValueError(
            f"{figure.task}: expected the metric {figure.metric!r}, got "
            f"{', '.join(rows[figure.task])}; this version of the harness has others"
        )
    return 100 * rows[figure.task][figure.metric], results


def _mean(
    rows: dict[str, Any], counts: dict[str, Any], metric: str
) -> dict[str, float]:
    """The mean of a metric over the documents of all tasks that have it."""
    pairs = [
        (counts[task]["effective"], row[metric])
        for task, row in rows.items()
        if task in counts and metric in row
    ]
    total = sum(count for count, _ in pairs)
    return {metric: sum(n * value for n, value in pairs) / total} if total else {}


def run_card(
    lm: GriffinLM,
    card: str,
    *,
    limit: int | None = None,
    assumed: bool = False,
    run_generated_code: bool = False,
) -> Iterator[Results]:
    """The figures of a model card beside ours.

    Args:
      lm: the model.
      card: name of a card.
      limit: most documents of a task; None takes all.
      assumed: whether figures whose setting the card leaves open are measured, too.
      run_generated_code: whether code that the model writes may be run here.

    Yields:
      For each figure `benchmark`, `setting`, `card` (the printed value), `task`,
      `metric`, `note`, `remark`; then `ours`, `difference` and `results`, or the
      `reason` why it is not measured.

    Raises:
      ValueError: there is no such card.
    """
    manager = None
    for figure in figures(card):
        row = {
            "benchmark": figure.benchmark,
            "setting": figure.setting,
            "card": figure.value,
            "task": figure.task,
            "metric": figure.metric,
            "note": figure.note,
            "remark": figure.remark,
        }
        reason = figure.reason_not_to_run(
            assumed=assumed, run_generated_code=run_generated_code
        )
        if not reason and (missing := _missing_packages(figure)):
            reason = f"it needs {', '.join(missing)}: pip install 'lm_eval[math]'"
        if not reason:
            manager = manager or task_manager()
            try:
                ours, results = run_figure(lm, figure, manager=manager, limit=limit)
                difference = ours - figure.value
                row |= {"ours": ours, "difference": difference, "results": results}
            except (ValueError, OSError, RuntimeError) as error:
                reason = f"{type(error).__name__}: {error}"
        yield row | ({"reason": reason} if reason else {})


def _missing_packages(figure: Figure) -> list[str]:
    """Names of packages that a figure's task needs and that are not installed."""
    return [name for name in figure.packages if importlib.util.find_spec(name) is None]


def harness_version() -> str:
    """The version of lm_eval."""
    return importlib.metadata.version("lm_eval")
