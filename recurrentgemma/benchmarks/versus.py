"""This package beside others: the official recurrentgemma 1.0.1, transformers, itself.

The regime asked about: float32, the same random weights and tokens for everybody, one
process each on this CPU, measured in turn: a RecurrentGemma of 67M parameters (width
768, six layers R R A, window 1024, 32000 pieces), and the Gemma 1 and Gemma 2 of 109.6M
parameters that other benchmarks compare, which the official package does not have.
Opponents that are not given are left out; `--before` names another checkout of this
project, such as a worktree of an older commit. No speed is reported before it is checked
that all compute the same. A row holds the median of each, how many times better ours is
(median of the ratios within rounds), and the limit that this machine's own matrix
products set.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma import _validation as check
from recurrentgemma import cost
from recurrentgemma.benchmarks import agreement, device
from recurrentgemma.benchmarks.measures import Plan, ceilings, compilations, measures
from recurrentgemma.benchmarks.models import SMALL_PRESETS
from recurrentgemma.benchmarks.opponents import checkpoint
from recurrentgemma.benchmarks.opponents.worker import Worker
from recurrentgemma.benchmarks.paired import OURS, Measure, columns, compare
from recurrentgemma.benchmarks.picture import Panel, Point, draw
from recurrentgemma.benchmarks.report import Column, Report, Row, note
from recurrentgemma.config import GriffinConfig

BEFORE = "before"
OTHERS = ("official", "transformers")
CONFIG = GriffinConfig(
    vocab_size=32000,
    width=768,
    mlp_width=3 * 768,
    num_layers=6,
    num_heads=6,
    head_dim=128,
    lru_width=768,
    num_gate_blocks=6,
    attention_window=1024,
    embedding_scale=27.75,  # sqrt(768) in bfloat16, as both opponents round it
    logits_soft_cap=30.0,
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is compared."""

    config: GriffinConfig
    """Architecture; see `checkpoint.write`."""
    plan: Plan
    """Sizes and repetitions."""
    others: tuple[str, ...] = OTHERS
    """Packages that have this model."""
    window: int | None = None
    """Most tokens at which transformers computes the same; None is any number."""


_GEMMA_PLAN = Plan(
    prefill_lengths=(2048, 8192),
    train_length=None,
    first_call_prompts=(),
    rounds_of_compilation=0,
)
SUBJECTS = {
    "recurrentgemma-67m": Subject(CONFIG, Plan(), window=CONFIG.attention_window),
    **{
        name: Subject(SMALL_PRESETS[name], _GEMMA_PLAN, ("transformers",))
        for name in ("gemma-100m", "gemma2-100m")
    },
}


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    for name in OTHERS:
        what = f"the Python of an environment that has the package ({name})"
        flags.DEFINE_string(f"{name}-python", None, what, flag_values=values)
    flags.DEFINE_string(
        "before", None, "the folder of another checkout of ours", flag_values=values
    )
    flags.DEFINE_list("models", list(SUBJECTS), "models to compare", flag_values=values)
    flags.DEFINE_integer(
        "repeats", Plan.rounds, "paired rounds", lower_bound=1, flag_values=values
    )
    flags.DEFINE_list(
        "only", [""], "rows, by the beginnings of their names", flag_values=values
    )


def run(
    values: dict[str, Any],
    folder: Path,
    subjects: Mapping[str, Subject] = SUBJECTS,
) -> None:
    """The whole comparison.

    Args:
      values: By flag name.
      folder: Where the document goes.
      subjects: Models by name, of which `--models` chooses.

    Raises:
      ValueError: a model is unknown, or an interpreter is not there.
      Disagreement: somebody computes something else.
      WorkerError: an opponent failed.
    """
    for name in values["models"]:
        check.choice("--models", name, list(subjects))
    chosen = {name: subjects[name] for name in values["models"]}
    plans = [subject.plan for subject in chosen.values()]
    every = [m for plan in plans for m in compilations(plan) + measures(plan)]
    if not _chosen(every, values):
        known = ", ".join(dict.fromkeys(measure.name for measure in every))
        expected = f"beginnings of names among {known}"
        check.refuse("--only", expected, ",".join(values["only"]))
    given = [name for name in OTHERS if _python(values, name) is not None]
    names = [OURS, *([BEFORE] if values["before"] else []), *given]
    shown = columns(names, Column("limit", "limit"))
    report = Report(
        folder / "versus.json",
        [Column("model", "model", max(map(len, chosen), default=0)), *shown],
        key=("model", "name"),
        models={},
    )
    for name, subject in chosen.items():
        _compare(name, subject, values, report)
    panels = [
        prefill_panel([row for row in report.rows if row["model"] == name], name)
        for name in chosen
    ]
    draw(folder / "versus.png", f"float32, {device.name()}", panels)


def _compare(
    name: str, subject: Subject, values: dict[str, Any], report: Report
) -> None:
    """Adds the rows of a model, and its facts under `models`."""
    config, plan = subject.config, subject.plan
    plan = dataclasses.replace(plan, rounds=values["repeats"])
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        checkpoint.write(Path(directory), config)
        workers = [
            stack.enter_context(contextlib.closing(worker))
            for worker in _workers(values, Path(directory), subject.others)
        ]
        compiling = _chosen(compilations(plan), values)
        compiled = [compare(measure, workers) for measure in compiling]
        findings = agreement.check(workers, plan, subject.window)
        note(f"{name}: all agree, {len(findings)} comparisons.")
        rates = device.rates(config, plan.decode_batches, "float32")
        report.facts["models"][name] = {
            "config": config.to_dict(),
            "parameters": cost.num_parameters(config),
            "agreement": findings,
            "rates": rates,
            "worker_versions": {w.name: w.ask("versions") for w in workers},
        }
        for row in compiled:
            report.add(row | {"model": name})
        limits = ceilings(config, plan, rates)
        for measure in _chosen(measures(plan), values):
            row = compare(measure, workers)
            report.add(row | {"model": name, "limit": limits.get(measure.name)})


def _chosen(some: Sequence[Measure], values: dict[str, Any]) -> list[Measure]:
    """Those whose names begin as `--only` says."""
    return [m for m in some if m.name.startswith(tuple(values["only"]))]


def prefill_panel(rows: list[Row], model: str) -> Panel:
    """Speed of a model's prefill by prompt length, of everybody; a line ends where one
    does not fit the memory."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        kind, _, length = row["name"].partition(" ")
        if kind == "prefill":
            for name, speed in row["median"].items():
                lines.setdefault(name, []).append(Point(int(length), speed))
    return Panel("prompt length, tokens", f"{model}: prefill, tokens/s", lines)


def _python(values: dict[str, Any], name: str) -> str | None:
    """The interpreter of an opponent; None, with a note, if it is left out."""
    python = values[f"{name}-python"]
    if python is None:
        note(f"{name} is left out: no --{name}-python.")
    elif not Path(python).is_file():
        raise ValueError(
            f"--{name}-python: expected a Python interpreter, got {python}"
        )
    return python


def _workers(
    values: dict[str, Any], directory: Path, others: Sequence[str]
) -> list[Worker]:
    found = [Worker(OURS, sys.executable, directory)]
    if values["before"] is not None:
        found.append(Worker(BEFORE, sys.executable, directory, Path(values["before"])))
    for name in others:
        if python := values[f"{name}-python"]:
            found.append(Worker(name, os.path.abspath(python), directory))
    return found
