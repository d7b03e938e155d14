"""A few-shot task with its examples read once, against reading them with each question.

The same questions with the same examples before them, and the same log-likelihoods,
which is checked before anything is timed. CPU time is measured, and the tokens that the
model reads are counted.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from recurrentgemma.benchmarks.paired import Disagreement
from recurrentgemma.benchmarks.report import Column, Report
from recurrentgemma.checkpoints import load
from recurrentgemma.evaluation.scorer import Continuation, LogLikelihood, Scorer
from recurrentgemma.generation.sampler import Sampler

COLUMNS = [
    Column("", "name", 24),
    Column("tokens read", "tokens_read", 14),
    Column("CPU s", "cpu_s", 10),
    Column("times less", "times_less", 12),
]
TOLERANCE = 1e-3
"""Largest difference of two log-likelihoods of some tokens, in nats."""


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("model", "nano", "a preset or checkpoint", flag_values=values)
    for name, default, what in (
        ("examples", 1000, "tokens of the examples"),
        ("questions", 32, "number of questions, of four choices each"),
        ("batch", 8, "rows at a time"),
        ("repeats", 3, "rounds, in turn"),
    ):
        flags.DEFINE_integer(name, default, what, lower_bound=1, flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """Draws the questions and answers them in both ways.

    Raises:
      Disagreement: the two ways found other log-likelihoods.
    """
    sampler = Sampler(*load(values["model"]), compile_ahead=False)
    rng = np.random.default_rng(0)
    vocab_size = sampler.model.config.vocab_size

    def draw(count: int) -> list[int]:
        return rng.integers(3, vocab_size, count).tolist()

    shots = [2, *draw(values["examples"])]
    requests = [
        Continuation(question, draw(4))
        for question in ([*shots, *draw(20)] for _ in range(values["questions"]))
        for _ in range(4)
    ]
    ways = {"read once": True, "read again": False}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    read = {}

    def answer(name: str) -> dict[int, LogLikelihood]:
        scorer = Scorer(sampler, batch_size=values["batch"], share=ways[name])
        start = time.process_time()
        found = dict(scorer.log_likelihoods(requests))
        seconds[name].append(time.process_time() - start)
        read[name] = scorer.tokens_read
        return found

    once, again = map(answer, ways)  # compiles, too
    worst = max(abs(once[i].log_prob - again[i].log_prob) for i in once)
    if worst > TOLERANCE:
        raise Disagreement(f"log-likelihoods differ by {worst:.2g} nats")
    for name in ways:
        seconds[name].clear()
    for _ in range(values["repeats"]):
        for name in ways:
            answer(name)
    report = Report(
        folder / "few_shot.json",
        COLUMNS,
        model=values["model"],
        examples_tokens=len(shots),
        questions=values["questions"],
        batch=values["batch"],
        largest_difference_nats=worst,
    )
    slow = seconds["read again"]
    for name in ways:
        ratios = [b / a for a, b in zip(seconds[name], slow, strict=True)]
        report.add(
            {
                "name": name,
                "tokens_read": read[name],
                "cpu_s": float(np.median(seconds[name])),
                "times_less": float(np.median(ratios)),
                "samples_s": seconds[name],
            }
        )
