"""The sampler's ways to write more at a time, beside the plain one: the same texts.

Ragged prompts through a batch: finished rows replaced by the next prompts, against fixed
batches, each as long as its longest row. With `--draft`, also speculative decoding,
against the model alone. Both ways must write the same tokens before they are timed in
turn. The model is the one of `versus`, with random weights, unless `--model` names
another.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
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
OTHER = "plain"


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("model", None, "a preset or checkpoint", flag_values=values)
    flags.DEFINE_string(
        "draft", None, "a smaller one of the same tokens", flag_values=values
    )
    for name, default, what in (
        ("draft-tokens", 4, "tokens that the draft proposes at a time"),
        ("prompts", 64, "number of texts"),
        ("batch", 16, "rows at a time"),
        ("repeats", 3, "paired rounds"),
    ):
        flags.DEFINE_integer(name, default, what, lower_bound=1, flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """Draws the prompts and compares the ways.

    Raises:
      Disagreement: two ways wrote different tokens.
    """
    if values["model"] is None:
        model = Griffin(CONFIG, rngs=nnx.Rngs(0))
    else:
        model, _ = load(values["model"])
    rng = np.random.default_rng(0)
    count, batch_size = values["prompts"], values["batch"]
    lengths, new_tokens = (
        rng.integers(low, high + 1, count) for low, high in (PROMPT_TOKENS, NEW_TOKENS)
    )
    vocab_size = model.config.vocab_size
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in lengths]

    def write(sampler: Sampler, at_once: int) -> list[Sample]:
        """The samples of all prompts, so many in a call."""
        samples = []
        for start in range(0, count, at_once):
            stop = start + at_once
            samples += sampler(
                prompts[start:stop],
                max_new_tokens=new_tokens[start:stop].tolist(),
                seed=start,
                end_tokens=[],
                batch_size=min(at_once, batch_size),
            )
        return samples

    plain = Sampler(model)
    refilled, fixed = partial(write, plain, count), partial(write, plain, batch_size)
    pairs = {f"refilled, {batch_size} slots": (refilled, fixed)}
    if values["draft"] is not None:
        draft, _ = load(values["draft"])
        number = values["draft-tokens"]
        sampler = Sampler(model, draft=draft, num_draft_tokens=number)
        ways = partial(write, sampler, 1), partial(write, plain, 1)
        pairs[f"draft, {number} proposed"] = ways
    report = Report(
        folder / "sampler.json",
        columns([OURS, OTHER]),
        model=values["model"] or "67M random parameters",
        draft=values["draft"],
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
    )
    for name, (ours, other) in pairs.items():
        report.add(
            compare_ways(name, Way(OURS, ours), Way(OTHER, other), values["repeats"])
        )
