"""Ragged prompts through a batch: finished rows replaced, against fixed batches.

Both ways must write the same tokens before they are timed in turn. A fixed batch is as
long as its longest row; a refilled one loses only its end. The model is the one of
`versus`, with random weights, unless `--model` names another.
"""

import argparse
from functools import partial

import numpy as np
from flax import nnx

from recurrentgemma.benchmarks.paired import OURS, Way, columns, compare_ways
from recurrentgemma.benchmarks.report import Report
from recurrentgemma.benchmarks.versus import CONFIG
from recurrentgemma.checkpoints import load
from recurrentgemma.generation.results import Sample
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.griffin import Griffin

PROMPT_TOKENS = (16, 512)
NEW_TOKENS = (16, 256)
FIXED = "fixed batches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--model", help="preset or checkpoint")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)


def run(options: argparse.Namespace) -> None:
    """Draws the prompts and compares both ways.

    Raises:
      Disagreement: the two ways wrote different tokens.
    """
    if options.model is None:
        sampler = Sampler(Griffin(CONFIG, rngs=nnx.Rngs(0)))
    else:
        sampler = Sampler(*load(options.model))
    count, batch_size = options.prompts, options.batch_size
    rng = np.random.default_rng(0)
    lengths, new_tokens = (
        rng.integers(low, high + 1, count) for low, high in (PROMPT_TOKENS, NEW_TOKENS)
    )
    vocab_size = sampler.model.config.vocab_size
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in lengths]

    def write(rows_at_once: int) -> list[Sample]:
        samples = []
        for start in range(0, count, rows_at_once):
            stop = start + rows_at_once
            samples += sampler(
                prompts[start:stop],
                max_new_tokens=new_tokens[start:stop].tolist(),
                seed=start,
                end_tokens=[],
                batch_size=batch_size,
            )
        return samples

    ways = [Way(OURS, partial(write, count)), Way(FIXED, partial(write, batch_size))]
    report = Report(
        options.output,
        columns([OURS, FIXED]),
        model=options.model or "67M random parameters",
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
    )
    name = f"{count} ragged prompts, {batch_size} slots"
    report.add(compare_ways(name, ways, options.rounds)[0])
