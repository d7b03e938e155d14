"""Text in, text out: continue, stream, read ahead and score with one model.

Prompts are read in chunks of three sizes, so that a new prompt length compiles nothing,
and continued in blocks of decode steps (see `recurrentgemma.generation.batching`). What a text
leaves behind is a `Prefix`, of one size for a Griffin model, which everything here can
start from. Neither the cache nor the programs grow with the text.
"""

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from recurrentgemma.generation.batching import Generation, Part, Request, Settings
from recurrentgemma.generation.prefill import Progress, RowReader, pieces_of
from recurrentgemma.generation.prefix import Prefix, model_digest
from recurrentgemma.generation.results import Sample, Score, TextStream
from recurrentgemma.generation.sampling import Sampling, check_seed
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import END_OF_TURN, Tokenizer

Prompt = str | Sequence[int]
"""A text, or token ids (the begin token first, usually)."""

MAX_DRAFT_TOKENS = 32
"""Most tokens that a draft may propose at a time."""


class Sampler:
    """Generates and scores text with a model.

    A row's text depends on its own prompt and seed, never on the other rows. The model
    is never changed; each call keeps its cache to itself.

    Example:
      >>> model, tokenizer = load("nano")
      >>> sampler = Sampler(model, tokenizer)
      >>> [sample] = sampler(["def "], max_new_tokens=50)
      >>> for piece in sampler.stream("import ", max_new_tokens=1000):
      ...     print(piece, end="")
      >>> book = sampler.prefill(open("book.txt", encoding="utf-8"))
      >>> answers = sampler(questions, prefix=book)
    """

    def __init__(
        self,
        model: Griffin,
        tokenizer: Tokenizer | None = None,
        *,
        draft: Griffin | None = None,
        num_draft_tokens: int = 4,
        compile_ahead: bool = True,
    ):
        """Compiles nothing yet.

        Args:
          model: the model, its layers not stacked.
          tokenizer: needed for text; token ids work without one.
          draft: a smaller model of the same tokenizer, for speculative decoding: it
            proposes tokens, which the model checks several at a time. The text is the
            same, and sooner there if the draft guesses well.
          num_draft_tokens: how many it proposes at a time, 1 to 32.
          compile_ahead: the first call with a batch size compiles the programs of all
            chunk sizes at once, so that no later prompt length compiles anything.
            False compiles each when it is needed first: for a single prompt.

        Raises:
          ValueError: the tokenizer has more pieces than the model has embeddings; the
            draft has another vocabulary; num_draft_tokens is out of its range.
        """
        vocab_size = model.config.vocab_size
        if draft is not None and draft.config.vocab_size != vocab_size:
            raise ValueError(
                f"draft: expected a model of the same {vocab_size} tokens, got one of "
                f"{draft.config.vocab_size}"
            )
        if _check_count("num_draft_tokens", num_draft_tokens) > MAX_DRAFT_TOKENS:
            raise ValueError(
                f"num_draft_tokens: expected at most {MAX_DRAFT_TOKENS}, got "
                f"{num_draft_tokens}"
            )
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer: expected at most the {vocab_size} pieces that the model "
                f"has embeddings for, got {tokenizer.vocab_size}; use the tokenizer "
                "that the model was trained with"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.draft = draft
        self.num_draft_tokens = num_draft_tokens
        self._compiled: set | None = set() if compile_ahead else None

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | Sequence[int] = 100,
        sampling: Sampling = Sampling(),
        seed: int | Sequence[int] = 0,
        num_samples: int = 1,
        prefix: Prefix | None = None,
        stop: Sequence[str] = (),
        end_tokens: Sequence[int] | None = None,
        return_logits: bool = False,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> list[Sample]:
        """Continues every prompt.

        Args:
          prompts: texts (an empty one starts from the begin token alone, or from the
            prefix) or lists of token ids, each at least one unless there is a prefix.
          max_new_tokens: most tokens to generate for each, at least 1; one number or
            one for each prompt.
          sampling: how tokens are chosen.
          seed: one for each sample; an int s means s + i for sample i. In [0, 2**32).
          num_samples: samples of each prompt, which is read once.
          prefix: what comes before each prompt: one row for all of them, or one for
            each. Texts then get no begin token.
          stop: strings that end a row; not part of its text.
          end_tokens: ids that end a row; None means the tokenizer's end token and, if
            it has one, <end_of_turn>. An empty list never ends.
          return_logits: whether `Sample.logits` is kept (4 V bytes a token).
          batch_size: rows at a time; a finished row's place is taken by the next
            prompt. None: all at once.
          progress: called while prompts are read.

        Returns:
          `num_samples` samples for each prompt, side by side.

        Raises:
          ValueError: an argument is out of its range, a prompt has no tokens or one
            that is not in the vocabulary, the prefix was made by another model, or
            there is no tokenizer for text.
        """
        if isinstance(prompts, str) or len(prompts) == 0:
            got = repr(prompts)[:40] if isinstance(prompts, str) else "none"
            raise ValueError(f"prompts: expected a list of at least one, got {got}")
        count = len(prompts)
        rows = count * _check_count("num_samples", num_samples)
        limits = _each("max_new_tokens", max_new_tokens, count, _check_count)
        if isinstance(seed, numbers.Integral):
            seed = [check_seed(seed) + i for i in range(rows)]
        seeds = _each("seed", seed, rows, lambda _, one: check_seed(one))
        prefixes = self._prefix_rows(prefix, count)
        # The longest first, so that none begins when the others are done.
        order = sorted(range(count), key=lambda i: -limits[i])
        asked = [
            Request(
                self._encode(f"prompts[{i}]", prompts[i], prefixes[i]),
                limits[i],
                seeds[i * num_samples],
                prefixes[i],
            )
            for i in order
        ]
        of_prompt = [seeds[i * num_samples : (i + 1) * num_samples] for i in order]
        generation = Generation(
            self.model,
            self._settings(sampling, end_tokens, stop, return_logits),
            asked if num_samples == 1 else self._forked(asked, of_prompt),
            rows if batch_size is None else _check_count("batch_size", batch_size),
            compiled=self._compiled,
            progress=progress,
        )
        samples: list[Sample | None] = [None] * rows
        for index, sample in _collect(
            generation, [request.tokens for request in asked], num_samples
        ):
            place, copy = divmod(index, num_samples)
            samples[order[place] * num_samples + copy] = sample
        return [sample for sample in samples if sample is not None]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 100,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        prefix: Prefix | None = None,
        stop: Sequence[str] = (),
        end_tokens: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> TextStream:
        """Continues one prompt and yields the text as it comes.

        Args: as for a call; see there.

        Raises:
          ValueError: as for a call, at once.
        """
        self._require_tokenizer()
        [row] = self._prefix_rows(prefix, 1)
        request = Request(
            self._encode("prompt", prompt, row),
            _check_count("max_new_tokens", max_new_tokens),
            check_seed(seed),
            row,
        )
        settings = dataclasses.replace(
            self._settings(sampling, end_tokens, stop), streams=True
        )
        generation = Generation(
            self.model,
            settings,
            [request],
            1,
            compiled=self._compiled,
            progress=progress,
        )
        return TextStream(
            generation,
            request,
            vocab_size=self.model.config.vocab_size,
            model_digest=self._model_digest,
            has_stop=bool(stop),
        )

    def iterate(
        self,
        prompts: Iterable[Prompt],
        *,
        batch_size: int,
        max_new_tokens: int = 100,
        sampling: Sampling = Sampling(),
        seed: int | Iterable[int] = 0,
        stop: Sequence[str] = (),
        end_tokens: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Sample]]:
        """Continues any number of prompts, a batch at a time, for as long as they come.

        A finished row's place is taken by the next prompt, so that rows of different
        lengths keep the device busy. A prompt is taken when there is room for it.

        Args: as for a call; the seed of prompt i is seed + i, or the i-th of `seed`.

        Yields:
          The index of a prompt and its sample, in the order in which they finish.

        Raises:
          ValueError: as for a call; of a prompt when its turn comes.
        """
        limit = _check_count("max_new_tokens", max_new_tokens)
        if isinstance(seed, int | np.integer):
            seed = itertools.count(check_seed(seed))
        read: dict[int, list[int]] = {}

        def requests():
            for i, (prompt, one) in enumerate(zip(prompts, seed, strict=False)):
                read[i] = self._encode(f"prompts[{i}]", prompt, None)
                yield Request(read[i], limit, check_seed(one))

        generation = Generation(
            self.model,
            self._settings(sampling, end_tokens, stop),
            requests(),
            _check_count("batch_size", batch_size),
            compiled=self._compiled,
        )

        def samples():
            for index, sample in _collect(generation, read):
                del read[index]
                yield index, sample

        return samples()

    def prefill(
        self,
        text: str | Iterable[str] | Iterable[int],
        *,
        prefix: Prefix | None = None,
        progress: Progress | None = None,
    ) -> Prefix:
        """Reads a text of any length, in memory that does not depend on it.

        Args:
          text: a text; its lines, each tokenised by itself (an open file, for
            example); or token ids, the begin token first, usually.
          prefix: one row to continue; None begins with the begin token.
          progress: called while the text is read.

        Returns:
          What was read, one row. `Prefix.repeat` and `prefix.concatenate` make more.

        Raises:
          ValueError: the text or the prefix is not as described; there is no tokenizer
            for text, or nothing at all was read.
        """
        reader, pieces = self._open(text, prefix)
        total = None
        for piece in pieces:
            if isinstance(text, str):
                total = len(piece.tokens)
            before = reader.num_tokens

            def show(read, _, before=before, total=total):
                if progress is not None:
                    progress(before + read, total)

            reader.read(piece.tokens, show)
        return reader.prefix()

    def score(
        self,
        text: str | Iterable[str] | Iterable[int],
        *,
        prefix: Prefix | None = None,
    ) -> Score:
        """The log-probability of every token of a text.

        Args: as for `prefill`.

        Returns:
          The scores of the whole text; `score_stream` gives them piece by piece.

        Raises:
          ValueError: as for `prefill`.
        """
        scores = list(self.score_stream(text, prefix=prefix))
        if not scores:
            raise ValueError("text: expected at least one token, got none")
        known = [score.num_bytes for score in scores if score.num_bytes is not None]
        return Score(
            tokens=[token for score in scores for token in score.tokens],
            log_probs=np.concatenate([score.log_probs for score in scores]),
            num_bytes=sum(known) if known else None,
            prefix=scores[-1].prefix,
        )

    def score_stream(
        self,
        text: str | Iterable[str] | Iterable[int],
        *,
        prefix: Prefix | None = None,
    ) -> Iterator[Score]:
        """Scores a text that may never end, in memory that does not grow.

        Args: as for `prefill`.

        Yields:
          The scores of about a thousand tokens, whole lines, and where they end.

        Raises:
          ValueError: as for `prefill`; of a line when its turn comes.
        """
        reader, pieces = self._open(text, prefix)
        skip = prefix is None

        def scores():
            nonlocal skip
            for piece in pieces:
                log_probs = reader.score(piece.tokens)
                tokens = piece.tokens[1:] if skip else piece.tokens
                skip = False
                yield Score(tokens, log_probs, piece.num_bytes, reader.prefix())

        return scores()

    @functools.cached_property
    def _model_digest(self) -> str:
        return model_digest(self.model)

    def _open(self, text, prefix):
        """A reader after the prefix, and the pieces of the text."""
        reader = RowReader(self.model, self._model_digest, prefix)
        vocab_size = self.model.config.vocab_size
        return reader, pieces_of(text, self.tokenizer, vocab_size, begin=prefix is None)

    def _forked(
        self, requests: list[Request], seeds: list[list[int]]
    ) -> Iterator[Request]:
        """Each request once for each of its seeds, its prompt read only once: when the
        first is taken."""
        for request, seeds_of_request in zip(requests, seeds, strict=True):
            reader = RowReader(self.model, self._model_digest, request.prefix)
            reader.read(request.tokens)
            prefix = reader.prefix()
            for seed in seeds_of_request:
                yield Request([], request.max_new_tokens, seed, prefix)

    def _settings(self, sampling, end_tokens, stop, keep_logits=False) -> Settings:
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(
                f"stop: expected a list of strings, none of them empty, got {stop!r}"
            )
        if stop:
            self._require_tokenizer()
        return Settings(
            tokenizer=self.tokenizer,
            sampling=sampling,
            end_mask=self._end_mask(end_tokens),
            stop=tuple(stop),
            keep_logits=keep_logits,
            draft=self.draft,
            num_draft_tokens=0 if self.draft is None else self.num_draft_tokens,
        )

    def _prefix_rows(self, prefix: Prefix | None, count: int) -> list[Prefix | None]:
        """The row that each of `count` prompts continues."""
        if prefix is None:
            return [None] * count
        prefix.check_model(self._model_digest)
        if prefix.batch_size == 1:
            return [prefix] * count
        if prefix.batch_size != count:
            raise ValueError(
                f"prefix: expected 1 or {count} rows, as there are {count} prompts, "
                f"got {prefix.batch_size}"
            )
        return [prefix.take([i]) for i in range(count)]

    def _encode(self, name: str, prompt: Prompt, prefix: Prefix | None) -> list[int]:
        """The tokens of a prompt, checked."""
        if isinstance(prompt, str):
            return self._require_tokenizer().encode(prompt, add_bos=prefix is None)
        tokens = [int(token) for token in prompt]
        if not tokens and prefix is None:
            raise ValueError(
                f"{name}: expected at least one token, got none; start from the begin "
                "token"
            )
        vocab_size = self.model.config.vocab_size
        wrong = next((t for t in tokens if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"{name}: expected tokens in [0, {vocab_size}), got {wrong}"
            )
        return tokens

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: expected one to work with text, got None; pass it to "
                "Sampler, or use token ids"
            )
        return self.tokenizer

    def _end_mask(self, end_tokens) -> np.ndarray:
        """bool [V], true at the end tokens."""
        vocab_size = self.model.config.vocab_size
        if end_tokens is None:
            tokenizer = self.tokenizer
            if tokenizer is None:
                raise ValueError(
                    "end_tokens: expected a list of ids (it may be empty), as there is "
                    "no tokenizer to ask, got None"
                )
            end_tokens = [tokenizer.eos_id]
            try:
                end_tokens.append(tokenizer.special_id(END_OF_TURN))
            except ValueError:
                pass  # A tokenizer without turns.
        mask = np.zeros(vocab_size, bool)
        for token in end_tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"end_tokens: expected ids in [0, {vocab_size}), got {token}"
                )
            mask[token] = True
        return mask


def _collect(
    generation: Generation, prompts, num_samples: int = 1
) -> Iterator[tuple[int, Sample]]:
    """Whole samples from the parts of a run, as they finish."""
    parts: dict[int, list[Part]] = {}
    for part in generation:
        parts.setdefault(part.index, []).append(part)
        if not part.is_last:
            continue
        row = parts.pop(part.index)
        kept = [one.logits for one in row if one.logits is not None]
        yield (
            part.index,
            Sample(
                text="".join(one.text for one in row),
                prompt_tokens=prompts[part.index // num_samples],
                tokens=[token for one in row for token in one.tokens],
                log_probs=np.concatenate([one.log_probs for one in row]),
                ended=part.ended,
                num_calls=sum(one.num_calls for one in row),
                logits=np.concatenate(kept) if kept else None,
            ),
        )


def _check_count(name: str, value) -> int:
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return int(value)


def _each(name: str, values, count: int, check) -> list[int]:
    """One checked value for each of `count`; a single one holds for all."""
    if isinstance(values, Sequence | np.ndarray):
        if len(values) != count:
            raise ValueError(
                f"{name}: expected one for each of the {count} rows, got {len(values)}"
            )
        return [check(name, value) for value in values]
    return [check(name, values)] * count
