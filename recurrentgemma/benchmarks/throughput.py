"""Ragged prompts through a batch: finished rows replaced, against fixed batches.

    python -m recurrentgemma.benchmarks.throughput

Both ways give the same tokens, which is checked, and are timed in turn. A fixed batch is
as long as its longest row; a refilled one loses only its end. The model is the one of
`versus`, with random weights, unless `--model` names another.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from recurrentgemma.benchmarks.paired import OURS, Measure, table, take_turns
from recurrentgemma.benchmarks.provenance import ROOT, provenance
from recurrentgemma.benchmarks.versus import CONFIG
from recurrentgemma.checkpoints import load
from recurrentgemma.generation.results import Sample
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.griffin import Griffin

RESULTS = ROOT / "recurrentgemma" / "benchmarks" / "results" / "throughput.json"
PROMPT_TOKENS = (16, 512)
NEW_TOKENS = (16, 256)
FIXED = "fixed batches"


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts of random lengths, each with its own number of tokens to write."""

    prompts: list[list[int]]
    new_tokens: list[int]

    @classmethod
    def draw(cls, count: int, vocab_size: int, seed: int = 0) -> "Workload":
        """Lengths uniform in the two ranges, ends included."""
        rng = np.random.default_rng(seed)
        lengths = rng.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1, count)
        new = rng.integers(NEW_TOKENS[0], NEW_TOKENS[1] + 1, count)
        prompts = [rng.integers(0, vocab_size, n).tolist() for n in lengths]
        return cls(prompts, new.tolist())


class Way:
    """One way of running the workload; a worker for `take_turns`."""

    peak_bytes = None

    def __init__(self, name: str, sampler: Sampler, work: Workload, batch_size: int):
        self.name = name
        self._sampler = sampler
        self._work = work
        self._batch_size = batch_size

    def run(self) -> list[Sample]:
        """Samples in the order of the prompts."""
        if self.name == OURS:
            return self._sample(0, len(self._work.prompts))
        starts = range(0, len(self._work.prompts), self._batch_size)
        batches = (self._sample(i, i + self._batch_size) for i in starts)
        return [sample for batch in batches for sample in batch]

    def tokens_per_s(self) -> float:
        """New tokens for a second of a run, prompts read and all."""
        start = time.perf_counter()
        self.run()
        return sum(self._work.new_tokens) / (time.perf_counter() - start)

    def _sample(self, start: int, stop: int) -> list[Sample]:
        return self._sampler(
            self._work.prompts[start:stop],
            max_new_tokens=self._work.new_tokens[start:stop],
            seed=start,
            end_tokens=[],
            batch_size=self._batch_size,
        )


def compare(
    model: str | None, count: int, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Both ways in turn; the JSON document.

    Raises:
      RuntimeError: the two ways wrote different tokens.
    """
    if model is None:
        sampler = Sampler(Griffin(CONFIG, rngs=nnx.Rngs(0)), compile_ahead=False)
    else:
        sampler = Sampler(*load(model), compile_ahead=False)
    work = Workload.draw(count, sampler.model.config.vocab_size)
    ways = [Way(name, sampler, work, batch_size) for name in (OURS, FIXED)]
    refilled, fixed = (way.run() for way in ways)
    different = sum(a.tokens != b.tokens for a, b in zip(refilled, fixed, strict=True))
    if different > count // 16:
        raise RuntimeError(f"{different} of {count} prompts got other tokens")
    measure = Measure(
        f"{count} ragged prompts, {batch_size} slots",
        "tokens/s",
        higher_is_better=True,
        sample=lambda way, _: way.tokens_per_s(),  # type: ignore[attr-defined]
        rounds=rounds,
    )
    result = take_turns(measure, ways)  # type: ignore[arg-type]
    print(table([result]))
    return {
        **provenance(),
        "model": model or "67M random parameters",
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rows_that_differ": different,
        "result": result.to_dict(),
    }


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    document = compare(
        arguments.model, arguments.prompts, arguments.batch_size, arguments.rounds
    )
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
