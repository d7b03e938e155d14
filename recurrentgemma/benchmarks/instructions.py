"""A small instruction set, made by a program: transformations of Python identifiers.

    # snake_case: parseHttpHeader
    parse_http_header

A prompt is a comment line, its response the next line. Every example is a pure function
of the seed, and held-out examples are never among those that are trained on.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.data import Batch

WORDS = [
    "parse",
    "read",
    "write",
    "open",
    "close",
    "load",
    "save",
    "send",
    "copy",
    "move",
    "find",
    "sort",
    "merge",
    "split",
    "join",
    "file",
    "name",
    "path",
    "line",
    "text",
    "byte",
    "list",
    "dict",
    "node",
    "tree",
    "item",
    "key",
    "value",
    "count",
    "index",
    "size",
    "user",
    "host",
    "port",
    "time",
    "date",
    "code",
    "type",
    "error",
    "state",
    "buffer",
    "stream",
    "header",
]
MIN_WORDS, MAX_WORDS = 2, 4


def _camel(words: Sequence[str]) -> str:
    return words[0] + "".join(word.title() for word in words[1:])


def _snake(words: Sequence[str]) -> str:
    return "_".join(words)


TASKS: dict[str, tuple[Callable, Callable]] = {
    "snake_case": (_camel, _snake),
    "camelCase": (_snake, _camel),
    "CONSTANT": (_snake, lambda words: _snake(words).upper()),
    "class": (_snake, lambda words: "".join(word.title() for word in words)),
    "last word": (_snake, lambda words: words[-1]),
    "arguments": (_snake, lambda words: f"({', '.join(words)})"),
}
"""What is asked, and how words are written in the prompt and in the response."""


class Example(NamedTuple):
    """What is asked and what is to be answered."""

    prompt: str
    response: str


def examples(count: int, *, seed: int = 0) -> list[Example]:
    """Different examples, in an order that depends on the seed alone.

    Args:
      count: number of examples.
      seed: of the draws.
    """
    rng, found = random.Random(seed), {}
    while len(found) < count:
        task = rng.choice(sorted(TASKS))
        words = rng.sample(WORDS, rng.randint(MIN_WORDS, MAX_WORDS))
        ask, answer = TASKS[task]
        example = Example(f"# {task}: {ask(words)}\n", f"{answer(words)}\n")
        found[example.prompt] = example
    return list(found.values())


def encode(tokenizer: Tokenizer, chosen: Sequence[Example], row_tokens: int) -> Batch:
    """One example a row; the loss is of the response and of the end token.

    Args:
      tokenizer: what encodes; prompt and response apart, as when one is continued.
      chosen: B examples.
      row_tokens: T.

    Raises:
      ValueError: an example is longer than a row.
    """
    shape = (len(chosen), row_tokens + 1)
    tokens = np.zeros(shape, np.int32)
    positions = np.full(shape, -1, np.int32)
    mask = np.zeros(shape, np.float32)
    for row, example in enumerate(chosen):
        prompt = tokenizer.encode(example.prompt)
        response = tokenizer.encode(example.response, add_bos=False)
        ids = [*prompt, *response, tokenizer.eos_id]
        if len(ids) > row_tokens + 1:
            raise ValueError(
                f"row_tokens: expected {len(ids) - 1} at least, got {row_tokens}"
            )
        tokens[row, : len(ids)] = ids
        positions[row, : len(ids)] = np.arange(len(ids))
        mask[row, len(prompt) : len(ids)] = 1
    return Batch(tokens[:, :-1], positions[:, :-1], tokens[:, 1:], mask[:, 1:])


def batches(
    tokenizer: Tokenizer,
    chosen: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    row_tokens: int,
) -> Iterator[Batch]:
    """A batch for each step: all examples in turn, again from the first."""
    for step in range(steps):
        places = range(step * batch_size, (step + 1) * batch_size)
        yield encode(tokenizer, [chosen[i % len(chosen)] for i in places], row_tokens)
