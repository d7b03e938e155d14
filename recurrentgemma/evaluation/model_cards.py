"""The figures of the model cards, and which of them a task reproduces.

`assets/model_cards.json` holds the 205 figures that the cards of RecurrentGemma, Gemma 1
and Gemma 2 print, with the card that each is from and the language of the copy that was
read, and for each the task of lm-evaluation-harness that is nearest to it. `match` says
how near:

    direct              the same benchmark, and the card's number of examples
    setting assumed     the same benchmark; the card leaves examples or metric open
    near, different metric, none
                        another quantity, or no task
"""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from recurrentgemma import _validation as check

_FILE = "model_cards.json"
_RUNS_CODE = ("humaneval", "mbpp")
"""Tasks that run code which the model writes."""
_PACKAGES = {"minerva_math": ("sympy", "math_verify", "antlr4")}
"""Packages that a task needs besides the harness."""
# Tasks that have only one split: examples come from it, too.
_FEWSHOT_SPLITS = {"bbq_ambig": "test", "bbq_disambig": "test"}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of a model card."""

    card: str
    """Name of the card's model."""
    category: str
    """"quality" or "safety"."""
    benchmark: str
    """Name of the benchmark on the card."""
    setting: str
    """Number of examples and the like, as the card says; or "not stated"."""
    value: float
    """Value that the card prints, in percent but for RealToxicity, BOLD and ToxiGen."""
    higher_is_better: bool | None
    """Whether more is better; None where that is not clear."""
    match: str
    """How near the harness's task is; see above."""
    task: str
    """Name of the harness's task; empty if there is none."""
    num_fewshot: int | None
    """Number of examples; None takes the task's."""
    metric: str
    """Name of the harness's metric; empty if there is none."""
    note: str
    """What the task does, or why it is not this figure."""
    remark: str
    """What is odd about the printed figure; mostly empty."""

    @property
    def runs_code(self) -> bool:
        """Whether the task runs code that the model writes."""
        return self.task in _RUNS_CODE

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that the task needs besides the harness."""
        return _PACKAGES.get(self.task, ())

    @property
    def fewshot_split(self) -> str | None:
        """Split that examples come from, where the task names none and needs some."""
        return _FEWSHOT_SPLITS.get(self.task) if self.num_fewshot else None

    def reason_not_to_run(self, *, assumed: bool, run_generated_code: bool) -> str:
        """Why this figure is not measured; empty if it is.

        Args:
          assumed: whether figures whose setting the card leaves open are measured.
          run_generated_code: whether code that the model writes may be run here.
        """
        if self.match == "setting assumed" and not assumed:
            note = f" ({self.note})" if self.note else ""
            return f"the card leaves the setting open{note}; --assumed runs it"
        if self.match not in ("direct", "setting assumed"):
            return self.note or "no task of the harness measures it"
        if self.runs_code and not run_generated_code:
            return "it runs code that the model writes; --run-generated-code allows it"
        return ""


def cards() -> dict[str, dict[str, Any]]:
    """Model, variant and source (title, language, address) of each card, by name."""
    document = _document()
    return {
        name: card | {"source": document["sources"][card["source"]]}
        for name, card in document["cards"].items()
    }


def figures(card: str | None = None) -> list[Figure]:
    """The figures of a card, in its order; None gives those of all cards.

    Raises:
      ValueError: there is no such card.
    """
    if card is not None:
        check.choice("card", card, cards())
    return [
        Figure(**fields)
        for fields in _document()["figures"]
        if card in (None, fields["card"])
    ]


@functools.cache
def _document() -> dict[str, Any]:
    file = importlib.resources.files("recurrentgemma") / "assets" / _FILE
    return json.loads(file.read_text(encoding="utf-8"))
