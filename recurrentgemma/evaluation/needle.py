"""Facts to find again in long texts: needle, multi-key needle and passkey.

    begin token, text, needle, text, question  ->  answer

At least `distance` tokens stand between the needle and the question: a model with local
attention must carry the fact through its recurrent state where they are more than a
window. Kinds:

    passkey         a number among sentences that repeat (arXiv 2305.16300, section 4.3)
    needle          a number of a city, in a text of your choice
    multi_needle    the same, with the numbers of other cities all over the text (RULER,
                    arXiv 2404.06654, "multi-keys")
    code            a number that is bound to a name in Python source

The answer is chosen among `choices` numbers by its log-likelihood, and counted as
generated where greedy decoding writes it. Each number of a choice is the right one in
turn: a model that forgets the needle is right in 1 / `choices` of the prompts, whatever
number it prefers. Prompts of one length share their text up to the needle, which a
`Scorer` reads once.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma.evaluation.scorer import Continuation, Scorer
from recurrentgemma.tokenizer import Tokenizer

ANSWER, CITY = "{answer}", "{city}"
CITIES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Hanoi", "Quito", "Delhi", "Rabat", "Perth"),
    *("Turin", "Kyoto", "Sofia", "Minsk", "Accra", "Dakar", "Bonn", "Bergen", "Leeds"),
)
DIGITS = 5
"""Number of digits of an answer."""

Row = dict[str, Any]


class Kind(NamedTuple):
    """What is hidden, and how it is asked for.

    Attributes:
      needle: Sentence that is hidden, with `{answer}` and maybe `{city}`.
      question: End of the prompt, without the space before the answer.
      text: Text around the needle; None takes the one that is given.
      others: Number of other needles.
    """

    needle: str
    question: str
    text: str | None = None
    others: int = 0


_OF_A_CITY = Kind(
    "\nThe special number of {city} is {answer}.\n",
    "\nWhat is the special number of {city}? The special number of {city} is",
)
KINDS = {
    "passkey": Kind(
        "\nThe pass key is {answer}. Remember it. {answer} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
        text=(
            "The grass is green. The sky is blue. The sun is yellow. Here we go. "
            "There and back again.\n"
        ),
    ),
    "needle": _OF_A_CITY,
    "multi_needle": _OF_A_CITY._replace(others=7),
    "code": Kind("\nPASS_KEY = {answer}\n", "\nPASS_KEY ="),
}


@dataclasses.dataclass(frozen=True)
class NeedleSettings:
    """What is asked of a model.

    Raises:
      ValueError: a value is outside its range.
    """

    kinds: tuple[str, ...] = ("needle", "multi_needle", "passkey")
    """Names in `KINDS`."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Numbers of tokens of the prompts."""
    distances: tuple[float, ...] = (0.25, 0.5, 1.5, 3, 6, 12, 24, 48, 96, 192)
    """Numbers of windows between needle and question; those that do not fit a length
    are left out."""
    window: int = 256
    """Number of tokens of a window."""
    samples: int = 10
    """Number of prompts for each length and distance."""
    choices: int = 10
    """Number of answers that the model chooses among: chance is 1 / choices."""
    seed: int = 0
    """Another seed gives other numbers."""

    def __post_init__(self):
        for name in ("kinds", "lengths", "distances"):
            if not tuple(check.series(name, getattr(self, name), "a list")):
                check.refuse(name, "a list of at least one", getattr(self, name))
        for kind in self.kinds:
            check.choice("kinds", kind, KINDS)
        for length in self.lengths:
            check.positive_integer("lengths", length)
        for distance in self.distances:
            check.number("distances", distance, least=0)
        for name in ("window", "samples"):
            check.positive_integer(name, getattr(self, name))
        check.integer("choices", self.choices, least=2, most=10**DIGITS // 2)


class Prompt(NamedTuple):
    """A prompt and the answers to choose among, the right one first.

    Attributes:
      tokens: Token ids of the prompt, the begin token first.
      answers: Token ids of each answer.
      numbers: Text of each answer.
    """

    tokens: list[int]
    answers: list[list[int]]
    numbers: list[str]


def prompts(
    tokenizer: Tokenizer,
    kind: str,
    text: str,
    length: int,
    distance: int,
    settings: NeedleSettings,
) -> list[Prompt] | None:
    """The prompts of one length and distance; None if they do not fit.

    Args:
      tokenizer: of the model.
      kind: a name in `KINDS`.
      text: stands around the needle unless the kind has its own; repeated if short.
      length: number of tokens of a prompt, the begin token included.
      distance: number of tokens between needle and question.
      settings: number of prompts and answers, seed.

    Raises:
      ValueError: the text is empty.
    """
    known = KINDS[kind]
    around = tokenizer.encode(known.text or text, add_bos=False)
    if not around:
        raise ValueError("text: expected at least one token, got none")
    found = []
    for sample in range(settings.samples):
        # Numbers do not depend on length and distance: prompts share what they can.
        draw, right = divmod(sample, settings.choices)
        rng = np.random.default_rng([settings.seed, draw])
        count = settings.choices + known.others
        low = 10 ** (DIGITS - 1)
        numbers = [str(low + n) for n in rng.choice(9 * low, count, replace=False)]
        numbers[0], numbers[right] = numbers[right], numbers[0]
        city, *others = rng.permutation(CITIES)[: known.others + 1].tolist()

        def encode(sentence: str, of: str, number: str = "") -> list[int]:
            filled = sentence.replace(CITY, of).replace(ANSWER, number)
            return tokenizer.encode(filled, add_bos=False)

        needle = encode(known.needle, city, numbers[0])
        question = encode(known.question, city)
        hay = [
            encode(known.needle, other, number)
            for other, number in zip(others, numbers[settings.choices :], strict=True)
        ]
        room = length - 1 - len(needle) - len(question)
        before = room - distance
        if before < 0 or room < sum(map(len, hay)):
            return None
        filler, spans = _filler(around, hay, room)
        # Another needle stays whole: this one stands before it.
        before = min(
            [start for start, stop in spans if start < before < stop] or [before]
        )
        row = [*filler[:before], *needle, *filler[before:], *question]
        answers = [encode(" " + number, "") for number in numbers[: settings.choices]]
        found.append(
            Prompt([tokenizer.bos_id, *row], answers, numbers[: settings.choices])
        )
    return found


def _filler(
    around: list[int], hay: list[list[int]], room: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """`room` tokens of text with other needles at equal distances, and where these are."""
    count = room - sum(map(len, hay))
    text = np.resize(around, count).tolist()
    parts = len(hay) + 1
    filler, spans = [], []
    for i, other in enumerate(hay):
        filler += text[count * i // parts : count * (i + 1) // parts]
        spans.append((len(filler), len(filler) + len(other)))
        filler += other
    return [*filler, *text[count * len(hay) // parts :]], spans


def measure(
    scorer: Scorer, text: str, settings: NeedleSettings = NeedleSettings()
) -> Iterator[Row]:
    """Asks for every kind, length and distance.

    Args:
      scorer: of the model.
      text: stands around needles of kinds that have no text of their own.
      settings: what is asked.

    Yields:
      For each kind and length one row for each distance: `kind`, `length` and `distance`
      in tokens, `windows`, `samples`, `accuracy` (share of prompts of which the right
      answer is the most probable of all), `chance`, `generated` (share that greedy
      decoding answers), `nats` (mean loss of a token of the right answer), `gain` (nats
      by which the right answer is more probable than a wrong one, on average: 0 for a
      model that forgets the needle, where `samples` is a multiple of `choices`).

    Raises:
      ValueError: the text is empty.
    """
    for kind in settings.kinds:
        for length in settings.lengths:
            asked: dict[float, list[Prompt]] = {}
            for windows in settings.distances:
                distance = round(windows * settings.window)
                some = prompts(scorer.tokenizer, kind, text, length, distance, settings)
                if some is not None:
                    asked[windows] = some
            requests = [
                Continuation(prompt.tokens, answer)
                for some in asked.values()
                for prompt in some
                for answer in prompt.answers
            ]
            answers = dict(scorer.log_likelihoods(requests))
            found = iter(range(len(requests)))
            for windows, some in asked.items():
                log_probs, greedy, nats = [], [], []
                for prompt in some:
                    places = [next(found) for _ in prompt.answers]
                    log_probs.append([answers[i].log_prob for i in places])
                    greedy.append(answers[places[0]].is_greedy)
                    nats.append(-log_probs[-1][0] / len(prompt.answers[0]))
                right, wrong = np.split(np.array(log_probs), [1], axis=1)
                yield {
                    "kind": kind,
                    "length": length,
                    "distance": round(windows * settings.window),
                    "windows": windows,
                    "samples": len(some),
                    "accuracy": float(np.mean(right[:, 0] > wrong.max(axis=1))),
                    "chance": 1 / settings.choices,
                    "generated": float(np.mean(greedy)),
                    "nats": float(np.mean(nats)),
                    "gain": float(np.mean(right[:, 0] - wrong.mean(axis=1))),
                }
