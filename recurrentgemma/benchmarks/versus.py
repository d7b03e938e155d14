"""This package beside the official recurrentgemma 1.0.1 and transformers, on one CPU.

    python -m recurrentgemma.benchmarks.versus \\
        --official-python /envs/official/bin/python \\
        --transformers-python /envs/transformers/bin/python

The regime asked about: float32, a model of 67M parameters (width 768, six layers R R A,
window 1024, 32000 pieces), the same random weights and tokens for everybody, one
process each, measured in turn. Environments that are not given are left out. First it
is checked that all compute the same; then come the figures: the median of each, in
brackets how many times better ours is (median of the ratios within rounds), and the
ceiling that this machine's own matrix products set. The JSON document, written last,
holds every single measurement.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurrentgemma.benchmarks import agreement
from recurrentgemma.benchmarks.limits import limits, rates
from recurrentgemma.benchmarks.measures import Plan, compilation, measures
from recurrentgemma.benchmarks.opponents import checkpoint
from recurrentgemma.benchmarks.opponents.worker import Worker
from recurrentgemma.benchmarks.paired import OURS, compare, table
from recurrentgemma.benchmarks.provenance import provenance
from recurrentgemma.config import GriffinConfig

RESULTS = Path(__file__).parent / "results" / "versus.json"

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


def run(
    pythons: dict[str, str | None],
    config: GriffinConfig,
    plan: Plan,
    directory: Path,
) -> dict[str, Any]:
    """The whole comparison.

    Args:
      pythons: Interpreter by opponent; None leaves the opponent out.
      config: See `checkpoint.write`.
      plan: Sizes and repetitions.
      directory: Empty; weights and the workers' logs go here.

    Returns:
      The document.

    Raises:
      Disagreement: Somebody computes something else.
      WorkerError: An opponent failed.
    """
    where = provenance()  # first: the checkout may move on while this runs
    checkpoint.write(directory, config)
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(name, python, directory))
            for name, python in pythons.items()
            if python is not None
        ]
        versions = {worker.name: worker.ask("versions") for worker in workers}
        window = config.attention_window
        findings = agreement.check(workers, plan, window)
        results = [compare(compilation(plan), workers)]
        findings += agreement.check_generation(workers, plan)
        findings += agreement.check_loss(workers, plan, window)
        _report(f"All agree: {len(findings)} comparisons.")
        measured = rates(config, plan.decode_batches)
        for measure in measures(plan):
            results.append(compare(measure, workers))
            _report(table(results[-1:]))
    return {
        **where,
        "versions": versions,
        "config": config.to_dict(),
        "agreement": findings,
        "rates": measured,
        "limits": limits(config, plan, measured),
        "results": [result.to_dict() for result in results],
        "table": table(results).splitlines(),
    }


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _found(name: str, python: str | None) -> str | None:
    if python is None or not Path(python).is_file():
        reason = "no environment given" if python is None else f"no file {python}"
        _report(f"{name} is left out: {reason} (--{name}-python).")
        return None
    return str(Path(python).absolute())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--official-python", metavar="PATH")
    parser.add_argument("--transformers-python", metavar="PATH")
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    pythons = {
        OURS: sys.executable,
        "official": _found("official", options.official_python),
        "transformers": _found("transformers", options.transformers_python),
    }
    with tempfile.TemporaryDirectory() as directory:
        document = run(pythons, CONFIG, Plan(rounds=options.rounds), Path(directory))
    print("\n".join(document["table"]))
    for name, ceiling in document["limits"].items():
        print(f"limit of this machine, {name}: {ceiling:.0f} tokens/s")
    options.output.parent.mkdir(exist_ok=True, parents=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
