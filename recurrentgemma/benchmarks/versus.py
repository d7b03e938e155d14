"""This package beside others: the official recurrentgemma 1.0.1, transformers, itself.

The regime asked about: float32, a model of 67M parameters (width 768, six layers R R A,
window 1024, 32000 pieces), the same random weights and tokens for everybody, one
process each on this CPU, measured in turn. Opponents that are not given are left out;
`--before` names another checkout of this project, such as a worktree of an older
commit. No speed is reported before it is checked that all compute the same. A row holds
the median of each, how many times better ours is (median of the ratios within rounds),
and the limit that this machine's own matrix products set.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma import cost
from recurrentgemma.benchmarks import agreement, device
from recurrentgemma.benchmarks.measures import Plan, ceilings, compilations, measures
from recurrentgemma.benchmarks.opponents import checkpoint
from recurrentgemma.benchmarks.opponents.worker import Worker
from recurrentgemma.benchmarks.paired import OURS, columns, compare
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


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    for name in OTHERS:
        what = f"the Python of an environment that has the package ({name})"
        flags.DEFINE_string(f"{name}-python", None, what, flag_values=values)
    flags.DEFINE_string(
        "before", None, "the folder of another checkout of ours", flag_values=values
    )
    flags.DEFINE_integer(
        "repeats", Plan.rounds, "paired rounds", lower_bound=1, flag_values=values
    )
    flags.DEFINE_list(
        "only", [""], "rows, by the beginnings of their names", flag_values=values
    )


def run(
    values: dict[str, Any],
    folder: Path,
    config: GriffinConfig = CONFIG,
    plan: Plan | None = None,
) -> None:
    """The whole comparison.

    Args:
      values: By flag name.
      folder: Where the document goes.
      config: The model; see `checkpoint.write`.
      plan: Sizes and repetitions.

    Raises:
      Disagreement: somebody computes something else.
      WorkerError: an opponent failed.
    """
    plan = plan or Plan(rounds=values["repeats"])
    parameters = cost.num_parameters(config)
    first, later = (
        [m for m in some if m.name.startswith(tuple(values["only"]))]
        for some in (compilations(plan), measures(plan))
    )
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        checkpoint.write(Path(directory), config)
        workers = [
            stack.enter_context(contextlib.closing(worker))
            for worker in _workers(values, Path(directory))
        ]
        names = [worker.name for worker in workers]
        report = Report(
            folder / "versus.json",
            columns(names, Column("limit", "limit")),
            worker_versions={worker.name: worker.ask("versions") for worker in workers},
            config=config.to_dict(),
            parameters=parameters,
        )
        compiled = [compare(measure, workers) for measure in first]
        findings = agreement.check(workers, plan, config.attention_window)
        note(f"All agree: {len(findings)} comparisons.")
        rates = device.rates(config, plan.decode_batches, "float32")
        report.facts |= {"agreement": findings, "rates": rates}
        for row in compiled:
            report.add(row)
        limits = ceilings(config, plan, rates)
        for measure in later:
            row = compare(measure, workers)
            report.add(row | {"limit": limits.get(measure.name)})
        title = f"{parameters / 1e6:.0f}M parameters, float32, {device.name()}"
        draw(folder / "versus.png", title, [prefill_panel(report.rows)])


def prefill_panel(rows: list[Row]) -> Panel:
    """Speed of prefill by prompt length, of everybody; a line ends where one does not
    fit the memory."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        kind, _, length = row["name"].partition(" ")
        if kind == "prefill":
            for name, speed in row["median"].items():
                lines.setdefault(name, []).append(Point(int(length), speed))
    return Panel("prompt length, tokens", "prefill, tokens/s", lines)


def _workers(values: dict[str, Any], directory: Path) -> list[Worker]:
    pythons = {name: values[f"{name}-python"] for name in OTHERS}
    for name, python in pythons.items():
        if python is None:
            note(f"{name} is left out: no --{name}-python.")
        elif not Path(python).is_file():
            raise ValueError(
                f"--{name}-python: expected a Python interpreter, got {python}"
            )
    found = [Worker(OURS, sys.executable, directory)]
    if values["before"] is not None:
        found.append(Worker(BEFORE, sys.executable, directory, Path(values["before"])))
    for name, python in pythons.items():
        if python is not None:
            found.append(Worker(name, os.path.abspath(python), directory))
    return found
