"""The check before anything is timed: everybody computes the same model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recurrentgemma.benchmarks.measures import Plan
from recurrentgemma.benchmarks.opponents.worker import Worker
from recurrentgemma.benchmarks.paired import OURS

LOGITS_TOLERANCE = 5e-4
"""Largest difference of a logit (they are capped at 30): float32 sums of thousands of
terms in different orders, through every layer."""
LOSS_TOLERANCE = 1e-4
"""Nats a token."""


class Disagreement(RuntimeError):
    """Somebody computes something else, so that timing it would mean nothing."""


def check(workers: Sequence[Worker], plan: Plan, window: int) -> list[dict[str, Any]]:
    """Compares logits, greedily generated tokens and the loss with ours.

    transformers shows W keys instead of W + 1 and joins in up to W tokens only.

    Args:
      workers: ours among them.
      plan: its `check_lengths`, `prompt`, `new_tokens` and `train_length` are used.
      window: W.

    Returns:
      What was compared, for the JSON document.

    Raises:
      Disagreement: a difference is above its tolerance.
    """
    findings = []
    for length in plan.check_lengths:
        able = [w for w in workers if w.name != "transformers" or length <= window]
        logits = {w.name: np.load(w.ask("logits", length=length)) for w in able}
        ours = logits.pop(OURS)
        for name, theirs in logits.items():
            difference = float(np.abs(ours - theirs).max())
            findings.append(_finding(f"logits {length}", name, difference))
            _require(difference <= LOGITS_TOLERANCE, findings[-1])
    return findings


def check_generation(workers: Sequence[Worker], plan: Plan) -> list[dict[str, Any]]:
    """Greedy tokens through everybody's sampler; see `check`."""
    tokens = {
        w.name: w.ask(
            "generate", batch=1, prompt=plan.prompt, new_tokens=1 + plan.new_tokens
        )["tokens"]
        for w in workers
    }
    ours = np.array(tokens.pop(OURS))
    findings = []
    for name, theirs in tokens.items():
        different = int((ours != np.array(theirs)).sum())
        findings.append(_finding("greedy tokens that differ", name, different))
        _require(different == 0, findings[-1])
    return findings


def check_loss(
    workers: Sequence[Worker], plan: Plan, window: int
) -> list[dict[str, Any]]:
    """The loss of the first and of the second train step: the update agrees too."""
    findings = []
    for step in "first", "second":
        losses = {
            w.name: w.ask("train", length=plan.train_length)["loss"] for w in workers
        }
        ours = losses.pop(OURS)
        for name, theirs in losses.items():
            findings.append(_finding(f"loss, {step} step", name, abs(ours - theirs)))
            comparable = name != "transformers" or plan.train_length <= window
            _require(
                not comparable or abs(ours - theirs) <= LOSS_TOLERANCE, findings[-1]
            )
    return findings


def _finding(what: str, opponent: str, difference: float) -> dict[str, Any]:
    return {"what": what, "opponent": opponent, "difference": difference}


def _require(condition: bool, finding: dict[str, Any]) -> None:
    if not condition:
        raise Disagreement(
            f"{finding['what']}: ours and {finding['opponent']} differ by "
            f"{finding['difference']:.3g}"
        )
