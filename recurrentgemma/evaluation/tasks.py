"""Tasks of JSONL files: multiple choice, and texts that are generated and compared.

A line is an object with the fields of one of these:

    {"prompt": "Q: 2 + 2\\nA:", "choices": [" 3", " 4"], "answer": 1}
    {"prompt": "Q: 2 + 2\\nA:", "answer": " 4"}

`answer` of the second kind is a text or a list of texts, each of which is right. It may
also have `match`, a name in `MATCHES`. The examples that come before every prompt are
lines of such a file, too: prompt and right answer, joined by empty lines.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma.evaluation.scorer import Continuation, Scorer, Text

ANSWER_FOLLOWS = "The answer is"
"""Words before the number of a chain of thought (arXiv 2201.11903)."""
SEPARATOR = "\n\n"
"""Stands between examples, and before the prompt."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")

Row = dict[str, Any]


def find_number(text: str) -> float | None:
    """The number that a text answers with: the first one behind "The answer is", if
    the text says so, else its last one; None if there is none."""
    _, follows, after = text.rpartition(ANSWER_FOLLOWS)
    behind = _NUMBER.findall(after) if follows else []
    found = behind[:1] or _NUMBER.findall(text)[-1:]
    return float(found[0].replace(",", "")) if found else None


def _same_number(text: str, answer: str) -> bool:
    number = find_number(text)
    return number is not None and number == find_number(answer)


MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda text, answer: text.strip() == answer.strip(),
    "start": lambda text, answer: text.strip().startswith(answer.strip()),
    "contains": lambda text, answer: answer.strip().lower() in text.lower(),
    "number": _same_number,
}
"""How a generated text is compared with a right answer."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A line of a task.

    Attributes:
      line: Number of the line, from 1.
      prompt: Text before the answer.
      choices: Answers to choose among; None for a text to generate.
      answers: Right answers.
      match: Name of the comparison of a generated text; None takes the task's.
    """

    line: int
    prompt: str
    choices: tuple[str, ...] | None
    answers: tuple[str, ...]
    match: str | None = None

    @property
    def example(self) -> str:
        """Prompt and right answer, as they stand before the prompts of other items."""
        return self.prompt + self.answers[0]


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """How the items of a file are asked.

    Raises:
      ValueError: a value is outside its range.
    """

    examples: tuple[Item, ...] = ()
    """Items that stand before every prompt with their answers."""
    introduction: str = ""
    """Text at the very beginning."""
    max_new_tokens: int = 256
    """Most tokens of a generated text."""
    stop: tuple[str, ...] = (SEPARATOR,)
    """Strings that end a generated text."""
    match: str = "exact"
    """Name in `MATCHES`, for items that name none."""

    def __post_init__(self):
        check.positive_integer("max_new_tokens", self.max_new_tokens)
        check.strings("stop", self.stop)
        check.choice("match", self.match, MATCHES)

    def prompt(self, item: Item) -> str:
        """The whole text before an item's answer."""
        shots = [example.example for example in self.examples]
        return SEPARATOR.join([*filter(None, [self.introduction]), *shots, item.prompt])


def read_items(path: str | os.PathLike[str], limit: int | None = None) -> list[Item]:
    """The items of a file.

    Args:
      path: the file; empty lines are left out.
      limit: most items to read, from the first; None reads all.

    Raises:
      ValueError: a line is no item (the message names file and line), or there is none.
      OSError: the file cannot be read.
    """
    path = check.path("path", path)
    items = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                items.append(_parse(number, json.loads(line.decode("utf-8"))))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if len(items) == limit:
                break
    if not items:
        raise ValueError(f"{path}: expected a JSON object on each line, got no lines")
    return items


def _parse(number: int, fields: Any) -> Item:
    if not isinstance(fields, dict):
        check.refuse("item", "a JSON object", fields)
    prompt, answer = fields.get("prompt"), fields.get("answer")
    if not isinstance(prompt, str):
        check.refuse("prompt", "a text", prompt)
    if "choices" in fields:
        choices = fields["choices"]
        if not isinstance(choices, list) or len(choices) < 2:
            check.refuse("choices", "a list of at least two texts", choices)
        choices = check.strings("choices", choices)
        place = check.integer("answer", answer, least=0, most=len(choices) - 1)
        return Item(number, prompt, choices, (choices[place],))
    answers = check.strings("answer", [answer] if isinstance(answer, str) else answer)
    if not answers:
        check.refuse("answer", "a text or a list of texts", answer)
    match = fields.get("match")
    if match is not None:
        check.choice("match", match, MATCHES)
    return Item(number, prompt, None, answers, match)


def evaluate(
    scorer: Scorer,
    items: Sequence[Item],
    settings: TaskSettings = TaskSettings(),
) -> list[Row]:
    """Asks a model all items.

    The right choice counts as found if it is the most probable one; `found_by_length`
    takes the log-likelihood for each byte of a choice, as for answers of unequal length
    (`acc_norm` of the evaluation harness).

    Args:
      scorer: of the model.
      items: from `read_items`.
      settings: examples, and how texts are generated and compared.

    Returns:
      For each item, in order: `line`, `answers`, `correct`; of a choice `choice`,
      `correct_by_length` and `log_probs` too, and of a text `text`.
    """
    encode = scorer.tokenizer.encode
    contexts = [encode(settings.prompt(item)) for item in items]
    pairs = [
        (i, choice) for i, item in enumerate(items) for choice in item.choices or ()
    ]
    requests = [
        _continuation(scorer, settings.prompt(items[i]), choice) for i, choice in pairs
    ]
    found: list[list[float]] = [[] for _ in items]
    answers = dict(scorer.log_likelihoods(requests))
    for place, (i, _) in enumerate(pairs):
        found[i].append(answers[place].log_prob)
    asked = [i for i, item in enumerate(items) if item.choices is None]
    texts = dict(
        scorer.texts(
            [Text(contexts[i], settings.max_new_tokens, settings.stop) for i in asked]
        )
    )
    generated = {i: texts[place] for place, i in enumerate(asked)}
    return [
        _generated_row(item, generated[i], item.match or settings.match)
        if item.choices is None
        else _choice_row(item, found[i])
        for i, item in enumerate(items)
    ]


def accuracy(rows: Sequence[Row]) -> Row:
    """Shares of right answers among the rows of `evaluate`."""
    figures: Row = {"items": len(rows)}
    for name in ("correct", "correct_by_length"):
        known = [row[name] for row in rows if name in row]
        if known:
            short = name.replace("correct", "accuracy")
            figures[short] = float(np.mean(known))
    return figures


def _continuation(scorer: Scorer, prompt: str, choice: str) -> Continuation:
    """Tokens of prompt and choice, cut where the prompt's tokens end; spaces at the
    end of a prompt go with the choice, as in the evaluation harness."""
    stripped = prompt.rstrip(" ")
    whole = scorer.tokenizer.encode(prompt + choice)
    context = scorer.tokenizer.encode(stripped)
    count = min(len(context), len(whole) - 1)
    return Continuation(whole[:count], whole[count:])


def _choice_row(item: Item, log_probs: list[float]) -> Row:
    choices = item.choices or ()
    by_length = [p / len(c.encode()) for p, c in zip(log_probs, choices, strict=True)]
    place = int(np.argmax(log_probs))
    return {
        "line": item.line,
        "answers": list(item.answers),
        "choice": place,
        "correct": choices[place] in item.answers,
        "correct_by_length": choices[int(np.argmax(by_length))] in item.answers,
        "log_probs": log_probs,
    }


def _generated_row(item: Item, text: str, match: str) -> Row:
    is_right = MATCHES[match]
    return {
        "line": item.line,
        "answers": list(item.answers),
        "text": text,
        "correct": any(is_right(text, answer) for answer in item.answers),
    }
