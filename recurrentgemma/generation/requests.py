"""What a sampler is asked for, checked before any work."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma.generation.history import History
from recurrentgemma.generation.model_digest import ModelDigest
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.sampling import Sampling, check_seed
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import END_OF_TURN, Tokenizer

Prompt = str | bytes | Sequence[int]
"""A text (bytes are UTF-8), or token ids (the begin token first, usually)."""
MAX_DRAFT_TOKENS = 32
"""Most tokens that a draft may propose at a time."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to continue."""

    index: int
    """Place of its sample among the results."""
    prompt_tokens: list[int]
    """What comes after the prefix; at least one token without a prefix."""
    max_new_tokens: int
    seed: int
    prefix: Prefix | None = None
    """One row, already read."""
    is_read: bool = False
    """Whether the prefix holds the prompt already."""

    def read(self, vocab_size: int) -> tuple[list[int], History]:
        """The tokens to read before the first draw, and the history after them."""
        start = (
            History.empty(vocab_size) if self.prefix is None else self.prefix.history
        )
        return start.read([] if self.is_read else self.prompt_tokens)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for all rows of a run."""

    tokenizer: Tokenizer | None
    sampling: Sampling
    end_mask: np.ndarray
    """bool [V], true at the tokens that end a row: which they are compiles nothing."""
    stop: Sequence[str] = ()
    keep_logits: bool = False
    streams: bool = False
    """Whether parts should come several times a second."""
    num_draft_tokens: int = 0
    """How many tokens the draft model proposes at once; 0 without one."""


positive = functools.partial(check.integer, least=1, most=check.MAX_COUNT)
"""Checks a number of rows or tokens."""


def num_bytes(text: Prompt) -> int | None:
    """Length of a text in bytes of UTF-8; None of token ids."""
    data = text.encode() if isinstance(text, str) else text
    return len(data) if isinstance(data, bytes) else None


class Inputs:
    """Checks what the calls of one sampler have in common."""

    def __init__(
        self,
        model: Griffin,
        tokenizer: Tokenizer | None,
        draft: Griffin | None,
        num_draft_tokens: int,
    ):
        """Arguments as for a `Sampler`."""
        check.instance("model", model, Griffin, "a Griffin model")
        num_draft_tokens = check.integer(
            "num_draft_tokens", num_draft_tokens, least=1, most=MAX_DRAFT_TOKENS
        )
        vocab_size = model.config.vocab_size
        if draft is not None:
            check.instance("draft", draft, Griffin, "a Griffin model or None")
            if draft.config.vocab_size != vocab_size:
                raise ValueError(
                    f"draft: expected a model of the same {vocab_size} tokens, got one "
                    f"of {draft.config.vocab_size}"
                )
        if tokenizer is not None:
            check.instance("tokenizer", tokenizer, Tokenizer, "a Tokenizer or None")
            if tokenizer.vocab_size > vocab_size:
                raise ValueError(
                    f"tokenizer: expected at most the {vocab_size} pieces that the "
                    f"model has embeddings for, got {tokenizer.vocab_size}; use the "
                    "tokenizer that the model was trained with"
                )
        self.vocab_size = vocab_size
        self.model_digest = ModelDigest(model)
        self._tokenizer = tokenizer
        self._num_draft_tokens = 0 if draft is None else num_draft_tokens

    def requests(
        self,
        prompts: Any,
        max_new_tokens: Any,
        seed: Any,
        num_samples: Any,
        prefix: Any,
    ) -> list[list[Request]]:
        """The copies of each prompt, of arguments of a sampler's call.

        The longest come first, so that none begins when the others are done.
        """
        prompts = list(check.series("prompts", prompts, "a list of at least one"))
        if not prompts:
            raise ValueError("prompts: expected a list of at least one, got none")
        copies = positive("num_samples", num_samples)
        rows = len(prompts) * copies
        limits = _one_each("max_new_tokens", max_new_tokens, len(prompts), positive)
        if not _is_list(seed):
            seed = [check_seed(seed) + i for i in range(rows)]
        seeds = _one_each("seed", seed, rows, lambda _, one: check_seed(one))
        prefixes = self.prefix_rows(prefix, len(prompts))
        asked = []
        for i, prompt in enumerate(prompts):
            tokens = self.tokens(f"prompts[{i}]", prompt, begin=prefix is None)
            asked.append(
                [
                    Request(row, tokens, limits[i], seeds[row], prefixes[i])
                    for row in range(i * copies, (i + 1) * copies)
                ]
            )
        return sorted(asked, key=lambda copies: -copies[0].max_new_tokens)

    def endless(
        self, prompts: Any, max_new_tokens: Any, seed: Any
    ) -> Iterator[Request]:
        """A request for each prompt as it comes, which is checked then."""
        check.series("prompts", prompts, "an iterable of prompts")
        limit = positive("max_new_tokens", max_new_tokens)
        if check.is_series(seed):
            seeds = iter(seed)
        else:
            seeds = itertools.count(check_seed(seed))

        def requests():
            for i, prompt in enumerate(prompts):
                tokens = self.tokens(f"prompts[{i}]", prompt, begin=True)
                one = next(seeds, None)
                if one is None:
                    raise ValueError(
                        f"seed: expected one for each prompt, got {i}; give more, or "
                        "an integer"
                    )
                yield Request(i, tokens, limit, check_seed(one))

        return requests()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError if there is none."""
        if self._tokenizer is None:
            raise ValueError(
                "tokenizer: expected one to work with text, got None; pass it to "
                "Sampler, or use token ids"
            )
        return self._tokenizer

    def tokens(self, name: str, prompt: Prompt, *, begin: bool) -> list[int]:
        """The tokens of a prompt, with `begin` at least one: nothing comes before it,
        and a text gets the begin token."""
        if isinstance(prompt, str | bytes):
            return self.tokenizer().encode(prompt, add_bos=begin)
        tokens = check.token_ids(name, prompt, self.vocab_size)
        if begin and not tokens:
            raise ValueError(
                f"{name}: expected at least one token, got none; start from the begin "
                "token"
            )
        return tokens

    def prefix_rows(self, prefix: Prefix | None, count: int) -> list[Prefix | None]:
        """The row that each of `count` texts continues."""
        if prefix is None:
            return [None] * count
        check.instance("prefix", prefix, Prefix, "a Prefix or None")
        prefix.check_model(self.model_digest())
        if prefix.batch_size == 1:
            return [prefix] * count
        if prefix.batch_size != count:
            more = f" or {count}, one for each text" if count > 1 else ""
            raise ValueError(
                f"prefix: expected one row{more}, got {prefix.batch_size}; take them"
            )
        return [prefix.take([i]) for i in range(count)]

    def settings(self, sampling: Any, end_tokens: Any, stop: Any, **others) -> Settings:
        """Settings of these arguments; `others` are fields of theirs."""
        stop = check.strings("stop", stop)
        if stop:
            self.tokenizer()
        return Settings(
            tokenizer=self._tokenizer,
            sampling=check.instance("sampling", sampling, Sampling, "a Sampling"),
            end_mask=self.end_mask(end_tokens),
            stop=stop,
            num_draft_tokens=self._num_draft_tokens,
            **others,
        )

    def end_mask(self, end_tokens: Sequence[int] | None) -> np.ndarray:
        """bool [V], true at the end tokens; None means those of the tokenizer."""
        if end_tokens is None:
            if self._tokenizer is None:
                raise ValueError(
                    "end_tokens: expected a list of ids (it may be empty), as there is "
                    "no tokenizer to ask, got None"
                )
            end_tokens = [self._tokenizer.eos_id]
            try:
                end_tokens.append(self._tokenizer.special_id(END_OF_TURN))
            except ValueError:
                pass  # A tokenizer without turns.
        mask = np.zeros(self.vocab_size, bool)
        mask[check.token_ids("end_tokens", end_tokens, self.vocab_size)] = True
        return mask


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and check.is_series(value)


def _one_each(name: str, values: Any, count: int, check_one: Callable) -> list[int]:
    """One checked value for each of `count`; a single one holds for all."""
    if not _is_list(values):
        return [check_one(name, values)] * count
    if len(values) != count:
        raise ValueError(
            f"{name}: expected one for each of the {count} rows, got {len(values)}"
        )
    return [check_one(name, value) for value in values]
