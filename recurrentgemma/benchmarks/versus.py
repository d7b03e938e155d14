"""This package beside others: the official recurrentgemma 1.0.1, transformers, itself.

    python -m recurrentgemma.benchmarks versus \\
        --official-python /envs/official/bin/python \\
        --transformers-python /envs/transformers/bin/python
    python -m recurrentgemma.benchmarks versus --before WORKTREE

The regime asked about: float32, a model of 67M parameters (width 768, six layers R R A,
window 1024, 32000 pieces), the same random weights and tokens for everybody, one
process each on this CPU, measured in turn. Opponents that are not given are left out;
`--before` names another checkout of this project, such as a worktree of an older
commit. No speed is reported before it is checked that all compute the same. A row holds
the median of each, how many times better ours is (median of the ratios within rounds),
and the limit that this machine's own matrix products set.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from recurrentgemma.benchmarks import agreement, runner
from recurrentgemma.benchmarks.limits import limits, rates
from recurrentgemma.benchmarks.measures import Plan, compilations, measures
from recurrentgemma.benchmarks.opponents import checkpoint
from recurrentgemma.benchmarks.opponents.worker import Worker
from recurrentgemma.benchmarks.paired import OURS, columns, compare
from recurrentgemma.benchmarks.report import Column, Report, note
from recurrentgemma.config import GriffinConfig

BEFORE = "before"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--official-python", type=_file, metavar="PATH")
    parser.add_argument("--transformers-python", type=_file, metavar="PATH")
    parser.add_argument(
        "--before", type=Path, metavar="DIRECTORY", help="another checkout of ours"
    )
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="rows, by the beginnings of their names"
    )


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a Python interpreter, got {text}")
    return str(Path(text).absolute())


def run(
    options: argparse.Namespace,
    config: GriffinConfig = CONFIG,
    plan: Plan | None = None,
) -> None:
    """The whole comparison.

    Args:
      options: Those of `add_arguments`, and `output`.
      config: The model; see `checkpoint.write`.
      plan: Sizes and repetitions.

    Raises:
      Disagreement: somebody computes something else.
      WorkerError: an opponent failed.
    """
    plan = plan or Plan(rounds=options.rounds)
    first, later = (
        [m for m in some if m.name.startswith(tuple(options.only))]
        for some in (compilations(plan), measures(plan))
    )
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        checkpoint.write(Path(directory), config)
        workers = [
            stack.enter_context(worker) for worker in _workers(options, Path(directory))
        ]
        names = [worker.name for worker in workers]
        report = Report(
            options.output,
            columns(names, Column("limit", "limit")),
            worker_versions={worker.name: worker.ask("versions") for worker in workers},
            config=config.to_dict(),
        )
        compiled = [compare(measure, workers) for measure in first]
        findings = agreement.check(workers, plan, config.attention_window)
        note(f"All agree: {len(findings)} comparisons.")
        measured = rates(config, plan.decode_batches)
        report.facts |= {"agreement": findings, "rates": measured}
        for row in compiled:
            report.add(row)
        ceilings = limits(config, plan, measured)
        for measure in later:
            row = compare(measure, workers)
            report.add(row | {"limit": ceilings.get(measure.name)})


def _workers(options: argparse.Namespace, directory: Path) -> list[Worker]:
    found = [Worker(OURS, sys.executable, directory)]
    if options.before:
        found.append(Worker(BEFORE, sys.executable, directory, options.before))
    for name in "official", "transformers":
        if python := getattr(options, f"{name}_python"):
            found.append(Worker(name, python, directory))
        else:
            note(f"{name} is left out: no --{name}-python.")
    return found


if __name__ == "__main__":
    runner.main(["versus", *sys.argv[1:]])
