"""What a fixed-size state costs in recall: accuracy of small models trained on tasks.

Griffin, Hawk and the multi-query Transformer learn to copy, to continue a pair seen
before (induction heads), to look up many keys (mqar) and to find a number in a phone
book, and are then asked on sequences longer than those of training. Recall of recurrent
models depends on the learning rate (arXiv 2508.19029), so every model is trained with
each rate and each seed; accuracy is the share of right answers. A run ends early where
every answer is right. By default two tasks are learned with one seed, which takes minutes
on a CPU; a result to show needs three (`--seeds 0,1,2`). `--size paper` has the sizes of
the Griffin paper and of Zoology, for an accelerator.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from recurrentgemma import _validation as check
from recurrentgemma import cost
from recurrentgemma.benchmarks import picture
from recurrentgemma.benchmarks.recall.experiments import (
    EXPERIMENTS,
    LEARNING_RATES,
    SEEDS,
    Experiment,
)
from recurrentgemma.benchmarks.recall.training import Learner
from recurrentgemma.benchmarks.report import Column, Report, Row
from recurrentgemma.benchmarks.sweep import earlier, measure_points
from recurrentgemma.config import GriffinConfig

KEY = ("size", "experiment", "most_steps", "model", "learning_rate", "seed")
COLUMNS = (
    Column("size", "size", 6),
    Column("task", "experiment", 11),
    Column("model", "model", 16),
    Column("rate", "learning_rate", 8),
    Column("seed", "seed", 5),
    Column("steps", "steps", 7),
    Column("seconds", "seconds", 8),
    Column("trained %", "trained", 10, 100),
    Column("longest %", "longest", 10, 100),
)
NAMES = list(EXPERIMENTS["small"])
DEFAULT_TASKS = ["induction", "mqar"]


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum(
        "size",
        "small",
        list(EXPERIMENTS),
        "small, or as in the papers",
        flag_values=values,
    )
    what = f"what is learned: {', '.join(NAMES)}"
    flags.DEFINE_list("tasks", DEFAULT_TASKS, what, flag_values=values)
    for name, default, what in (
        ("learning-rates", LEARNING_RATES, "highest learning rates"),
        ("seeds", SEEDS, "seeds of parameters and rows"),
    ):
        texts = [f"{value:g}" for value in default]
        flags.DEFINE_list(name, texts, what, flag_values=values)
    flags.DEFINE_integer(
        "steps", None, "most steps of a run", lower_bound=1, flag_values=values
    )


def run(values: dict[str, Any], folder: Path) -> None:
    """Trains what is missing in the document, and draws everything."""
    size, rates, seeds = values["size"], [], []
    for name in values["tasks"]:
        check.choice("--tasks", name, NAMES)
    for text in values["learning-rates"]:
        rates.append(check.number("--learning-rates", _number(text), above=0))
    for text in values["seeds"]:
        seeds.append(check.integer("--seeds", _number(text), least=0, most=2**31 - 1))
    experiments = {name: EXPERIMENTS[size][name] for name in values["tasks"]}
    if values["steps"] is not None:
        experiments = {
            name: dataclasses.replace(
                made, plan=dataclasses.replace(made.plan, steps=values["steps"])
            )
            for name, made in experiments.items()
        }
    points: list[Row] = [
        dict(zip(KEY, (size, name, made.plan.steps, model, *rest), strict=True))
        for name, made in experiments.items()
        for model in made.models
        for rest in itertools.product(rates, seeds)
    ]

    @functools.lru_cache(1)
    def learner_of(name: str, model: str) -> Learner:
        made = experiments[name]
        return Learner(made.task, made.models[model], made.plan)

    def train(row: Row) -> Row:
        name = row["experiment"]
        learner = learner_of(name, row["model"])
        return measure(experiments[name], learner, row["learning_rate"], row["seed"])

    path = folder / "recall.json"
    rows = earlier(path, benchmark="recall").get("rows", ())
    report = Report(path, COLUMNS, key=KEY, rows=rows, benchmark="recall")
    measure_points(report, points, train, title="recall")
    draw(folder, report.rows)


def measure(
    experiment: Experiment, learner: Learner, learning_rate: float, seed: int
) -> Row:
    """A run, and its accuracy at every test length."""
    start = time.perf_counter()
    result = learner.train(learning_rate, seed)
    seconds = time.perf_counter() - start
    tests = []
    for length, task in experiment.tests:
        tokens = task.sample(np.random.default_rng(0), 1, length).tokens.shape[1]
        tests.append(
            {
                "length": length,
                "tokens": tokens,
                "accuracy": learner.accuracy(result.params, length, task=task),
                "state_bytes": state_bytes(learner.config, tokens),
            }
        )
    return {
        "parameters": cost.num_parameters(learner.config),
        "batch": learner.plan.batch_size,
        "steps": result.steps,
        "seconds": seconds,
        "curve": result.curve,
        "tests": tests,
        "trained": result.curve[-1][1],
        "longest": tests[-1]["accuracy"],
    }


def state_bytes(config: GriffinConfig, tokens: int) -> int:
    """Bytes of the cache of one row after so many tokens."""
    return cost.cache_bytes(config, dtype="float32", capacity=tokens)


def draw(folder: Path, rows: Iterable[Row]) -> None:
    """A picture for each size, task and number of steps: accuracy by length, bytes of
    state and learning rate."""
    for group in _by(KEY[:3], rows):
        size, name, steps = (group[0][key] for key in KEY[:3])
        best = [point for model in _by(["model"], group) for point in _best(model)]
        by_rate = [
            {"model": row[0]["model"], "rate": row[0]["learning_rate"]}
            | {"accuracy": statistics.median(r["trained"] for r in row)}
            for model in _by(["model"], group)
            for row in _by(["learning_rate"], model)
        ]
        panels = [
            picture.Panel(x_label, "accuracy", lines, key == "tokens", is_linear=True)
            for x_label, key, rows in (
                ("tokens of the test", "tokens", best),
                ("bytes of state in the test", "state_bytes", best),
                ("learning rate, at the longest of training", "rate", by_rate),
            )
            for lines in [picture.lines_of(rows, "accuracy", key, ["model"])]
        ]
        title = f"{name}, {size}: median of the seeds, at the best learning rate"
        picture.draw(folder / f"recall_{size}_{name}_{steps}.png", title, panels)


def _best(rows: list[Row]) -> list[Row]:
    """Median accuracy by test of the learning rate that does best on all of them."""
    medians = [
        [
            {"model": rows[0]["model"], "tokens": test[0]["tokens"]}
            | {"state_bytes": test[0]["state_bytes"]}
            | {"accuracy": statistics.median(t["accuracy"] for t in test)}
            for test in zip(*(row["tests"] for row in of_rate), strict=True)
        ]
        for of_rate in _by(["learning_rate"], rows)
    ]
    return max(medians, key=lambda tests: sum(test["accuracy"] for test in tests))


def _by(keys: Sequence[str], rows: Iterable[Row]) -> list[list[Row]]:
    """The rows, in groups of equal values."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.values())


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
