"""The check before any speed is reported: everybody computes the same model.

The RecurrentGemma of transformers shows W keys where the others show W + 1, so that it
joins in where all that is read fits the window. (Compilation happens once, and is timed on the way here.)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from recurrentgemma.benchmarks.measures import Plan
from recurrentgemma.benchmarks.opponents.worker import Worker
from recurrentgemma.benchmarks.paired import OURS, Disagreement

LOGITS_TOLERANCE = 5e-4
"""Largest difference of a logit (they are capped at 30): float32 sums of thousands of
terms in different orders, through every layer."""
LOSS_TOLERANCE = 1e-4
"""Nats a token."""


def check(
    workers: Sequence[Worker], plan: Plan, window: int | None
) -> list[dict[str, Any]]:
    """Compares logits, greedy tokens and losses with ours.

    Logits at every length of `plan.check_lengths`; the tokens of one row through
    everybody's sampler; the loss of two train steps, so that the update agrees too, at
    the length that is timed and at one that fits the window.

    Args:
      workers: Ours among them.
      plan: Sizes of the comparison.
      window: Most tokens at which transformers computes the same; None is any number.

    Returns:
      What was compared, for the JSON document.

    Raises:
      Disagreement: a difference is above its tolerance.
    """
    findings = []
    for what, length, tolerance, command, arguments in _questions(plan, window):
        fits = window is None or length <= window
        able = [w for w in workers if w.name != "transformers" or fits]
        answers = {w.name: _values(w.ask(command, **arguments)) for w in able}
        ours = answers.pop(OURS)
        for name, theirs in answers.items():
            difference = float(np.abs(ours - theirs).max())
            if not difference <= tolerance:  # true of NaN too
                raise Disagreement(
                    f"{what}: {OURS} and {name} differ by {difference:.3g}"
                )
            finding = {"what": what, "opponent": name, "difference": difference}
            findings.append(finding)
    return findings


def _questions(
    plan: Plan, window: int | None
) -> Iterator[tuple[str, int, float, str, dict[str, Any]]]:
    """What is compared, tokens that are read, tolerance, command and arguments."""
    for length in plan.check_lengths:
        yield f"logits {length}", length, LOGITS_TOLERANCE, "logits", {"length": length}
    new_tokens = 1 + plan.new_tokens
    greedy = {"batch": 1, "prompt": plan.prompt, "new_tokens": new_tokens}
    yield "greedy tokens", plan.prompt + new_tokens, 0, "generate", greedy
    if plan.train_length is None:
        return
    shorter = min(plan.train_length, window or plan.train_length)
    for length in sorted({shorter, plan.train_length}):
        for step in "first", "second":
            what = f"loss {length}, {step} step"
            yield what, length, LOSS_TOLERANCE, "train", {"length": length}


def _values(answer: Any) -> np.ndarray:
    """The numbers of a reply: an array's path, tokens or a loss."""
    if isinstance(answer, str):
        return np.load(answer)
    return np.asarray(answer.get("tokens", answer.get("loss")))
