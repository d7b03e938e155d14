"""Text in, text out: continue, stream, read ahead and score with one model.

Prompts are read in chunks of three sizes, so that a new prompt length compiles nothing,
and continued in blocks of decode steps (see `recurrentgemma.generation.batching`). A
text that was read is a `Prefix`, of one size for a Griffin model, which everything here
can start from. Neither the cache nor the programs grow with the text.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma.generation.batching import Generation, Part, Request, Settings
from recurrentgemma.generation.chunk_reader import ChunkReader, Progress
from recurrentgemma.generation.model_digest import ModelDigest
from recurrentgemma.generation.prefill import (
    RowReader,
    Text,
    is_whole,
    pieces_of,
    score_rows,
)
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.results import Sample, Score, TextStream
from recurrentgemma.generation.sampling import Sampling, check_seed
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import END_OF_TURN, Tokenizer

Prompt = str | bytes | Sequence[int]
"""A text (bytes are UTF-8), or token ids (the begin token first, usually)."""

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
          compile_ahead: once the first text of a batch size is under way, a thread
            compiles the programs of all chunk sizes, so that no later prompt length
            compiles anything. False compiles each when it is needed first: for a
            single prompt.

        Programs stay in memory for each batch size that was used (tens of MB for a
        small model); `jax.clear_caches()` frees them.

        Raises:
          ValueError: the tokenizer has more pieces than the model has embeddings; the
            draft has another vocabulary; num_draft_tokens is out of its range.
        """
        check.instance("model", model, Griffin, "a Griffin model")
        for name, value, kind, expected in (
            ("tokenizer", tokenizer, Tokenizer, "a Tokenizer or None"),
            ("draft", draft, Griffin, "a Griffin model or None"),
        ):
            if value is not None:
                check.instance(name, value, kind, expected)
        check.boolean("compile_ahead", compile_ahead)
        vocab_size = model.config.vocab_size
        if draft is not None and draft.config.vocab_size != vocab_size:
            raise ValueError(
                f"draft: expected a model of the same {vocab_size} tokens, got one of "
                f"{draft.config.vocab_size}"
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
        self._digest_of_model = ModelDigest(model)
        self.num_draft_tokens = check.integer(
            "num_draft_tokens", num_draft_tokens, least=1, most=MAX_DRAFT_TOKENS
        )
        models = [model] if draft is None else [model, draft]
        self._readers = [ChunkReader(m, compile_ahead=compile_ahead) for m in models]

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.model)
        parameters = f"{sum(leaf.size for leaf in leaves) / 1e6:.1f}M parameters"
        draft = "" if self.draft is None else f", {self.num_draft_tokens} draft tokens"
        text = "text" if self.tokenizer is not None else "token ids alone"
        return f"Sampler({parameters}, {text}{draft})"

    def wait_until_compiled(self) -> None:
        """Returns when no thread compiles any more: before a time is measured."""
        for reader in self._readers:
            reader.wait()

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
        check.series("prompts", prompts, "a list of at least one")
        check.boolean("return_logits", return_logits)
        check.function("progress", progress)
        prompts = list(prompts)
        if not prompts:
            raise ValueError("prompts: expected a list of at least one, got none")
        num_samples = _count("num_samples", num_samples)
        count = len(prompts)
        rows = count * num_samples
        limits = _each("max_new_tokens", max_new_tokens, count, _count)
        if not _is_list(seed):
            seed = [check_seed(seed) + i for i in range(rows)]
        seeds = _each("seed", seed, rows, lambda _, one: check_seed(one))
        prefixes = self._prefix_rows(prefix, count)
        requests = [
            [
                Request(i * num_samples + copy, tokens, limits[i], one, prefixes[i])
                for copy, one in enumerate(seeds[i * num_samples :][:num_samples])
            ]
            for i, prompt in enumerate(prompts)
            for tokens in [self._encode(f"prompts[{i}]", prompt, prefixes[i])]
        ]
        # The longest first, so that none begins when the others are done.
        requests.sort(key=lambda copies: -copies[0].max_new_tokens)
        slots = rows if batch_size is None else _count("batch_size", batch_size)
        generation = Generation(
            self._readers,
            self._settings(sampling, end_tokens, stop, keep_logits=return_logits),
            itertools.chain(*requests) if num_samples == 1 else self._forked(requests),
            slots,
            reads_together=rows <= slots,
            progress=progress,
        )
        samples = dict(_samples(generation))
        return [samples[i] for i in range(rows)]

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
        check.function("progress", progress)
        [row] = self._prefix_rows(prefix, 1)
        request = Request(
            0,
            self._encode("prompt", prompt, row),
            _count("max_new_tokens", max_new_tokens),
            check_seed(seed),
            row,
        )
        settings = self._settings(sampling, end_tokens, stop, streams=True)
        return TextStream(
            Generation(
                self._readers,
                settings,
                [request],
                1,
                reads_together=True,
                progress=progress,
            ),
            model_digest=self._model_digest,
            has_stop=bool(settings.stop),
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
          ValueError: as for a call, at once; for a prompt or its seed, or where there
            is no seed for a prompt, when all prompts before it have their samples.
        """
        check.series("prompts", prompts, "an iterable of prompts")
        limit = _count("max_new_tokens", max_new_tokens)
        if check.is_series(seed):
            seeds = iter(seed)  # pyright: ignore
        else:
            seeds = itertools.count(check_seed(seed))

        def requests():
            for i, prompt in enumerate(prompts):
                tokens = self._encode(f"prompts[{i}]", prompt, None)
                one = next(seeds, None)
                if one is None:
                    raise ValueError(
                        f"seed: expected one for each prompt, got {i}; give more, or "
                        "an integer"
                    )
                yield Request(i, tokens, limit, check_seed(one))

        settings = self._settings(sampling, end_tokens, stop)
        slots = _count("batch_size", batch_size)
        return _samples(Generation(self._readers, settings, requests(), slots))

    def prefill(
        self,
        text: Text,
        *,
        prefix: Prefix | None = None,
        progress: Progress | None = None,
    ) -> Prefix:
        """Reads a text of any length, in memory that does not depend on it.

        Args:
          text: one text; an open file or another iterator of lines, each tokenised by
            itself; or token ids, the begin token first, usually.
          prefix: one row to continue; None begins with the begin token.
          progress: called while the text is read.

        Returns:
          The prefix, one row. `Prefix.repeat` and `prefix.concatenate` make more.

        Raises:
          ValueError: the text or the prefix is not as described; there is no tokenizer
            for text, or the text is empty.
        """
        check.function("progress", progress)
        reader, pieces = self._open(text, prefix)
        for piece in pieces:
            before = reader.num_tokens
            total = len(piece.tokens) if is_whole(text) else None

            def show(read, _, before=before, total=total):
                if progress is not None:
                    progress(before + read if total is None else read, total)

            reader.read(piece.tokens, show)
        return reader.prefix()

    def score(self, text: Text, *, prefix: Prefix | None = None) -> Score:
        """The log-probability of every token of one text.

        Args: as for `prefill`.

        Returns:
          The scores of the whole text; `score_stream` gives them piece by piece, and
          `score_many` those of several texts.

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

    def score_many(
        self,
        texts: Iterable[Prompt],
        *,
        batch_size: int = 16,
        prefix: Prefix | None = None,
        progress: Progress | None = None,
    ) -> list[Score]:
        """The scores of several texts, a batch at a time, without their prefixes.

        Args:
          texts: texts or lists of token ids, each at least one unless there is a prefix.
          batch_size: texts at a time; changes no score but for rounding.
          prefix: what comes before each text, one row.
          progress: called after each batch with the texts scored so far, and all.

        Returns:
          The score of each text, as `score` gives it, in the order of `texts`.

        Raises:
          ValueError: as for a call; nothing is scored then.
        """
        check.series("texts", texts, "a list of texts")
        check.function("progress", progress)
        slots = _count("batch_size", batch_size)
        [before] = self._prefix_rows(prefix, 1)
        held = [] if before is None else before.history.last_token.tolist()
        rows, num_bytes = [], []
        for i, text in enumerate(texts):
            rows.append([*held, *self._encode(f"texts[{i}]", text, before)])
            data = text.encode() if isinstance(text, str) else text
            num_bytes.append(len(data) if isinstance(data, bytes) else None)
        scores = score_rows(self._readers[0], rows, slots, before, progress)
        return [
            Score(list(row[1:]), log_probs, size)
            for row, log_probs, size in zip(rows, scores, num_bytes, strict=True)
        ]

    def score_stream(
        self, text: Text, *, prefix: Prefix | None = None
    ) -> Iterator[Score]:
        """Scores a text that may never end, in memory that does not grow.

        Args: as for `prefill`.

        Yields:
          The scores of about a thousand tokens, whole lines, and where they end; of a
          text or a list of tokens, all scores at once.

        Raises:
          ValueError: as for `prefill`; of a line when its turn comes.
        """
        reader, pieces = self._open(text, prefix)

        def scores():
            for piece in pieces:
                log_probs = reader.score(piece.tokens)
                # Nothing comes before the first token of all.
                tokens = piece.tokens[len(piece.tokens) - len(log_probs) :]
                yield Score(tokens, log_probs, piece.num_bytes, reader.prefix())

        return scores()

    @property
    def _model_digest(self) -> str:
        return self._digest_of_model()

    def _open(self, text, prefix):
        """A reader after the prefix, and the pieces of the text."""
        self._check_prefix(prefix)
        reader = RowReader(self._readers[0], self._model_digest, prefix)
        vocab_size = self.model.config.vocab_size
        return reader, pieces_of(text, self.tokenizer, vocab_size, begin=prefix is None)

    def _forked(self, requests: list[list[Request]]) -> Iterator[Request]:
        """All copies of each request, whose prompt is read once: before the first."""
        for copies in requests:
            first = copies[0]
            reader = RowReader(self._readers[0], self._model_digest, first.prefix)
            reader.read(first.prompt_tokens)
            prefix = reader.prefix()
            for request in copies:
                yield dataclasses.replace(request, prefix=prefix, is_read=True)

    def _settings(self, sampling, end_tokens, stop, **others) -> Settings:
        stop = check.strings("stop", stop)
        if stop:
            self._require_tokenizer()
        return Settings(
            tokenizer=self.tokenizer,
            sampling=check.instance("sampling", sampling, Sampling, "a Sampling"),
            end_mask=self._end_mask(end_tokens),
            stop=stop,
            num_draft_tokens=0 if self.draft is None else self.num_draft_tokens,
            **others,
        )

    def _check_prefix(self, prefix: Prefix | None) -> None:
        if prefix is not None:
            check.instance("prefix", prefix, Prefix, "a Prefix or None")
            prefix.check_model(self._model_digest)

    def _prefix_rows(self, prefix: Prefix | None, count: int) -> list[Prefix | None]:
        """The row that each of `count` prompts continues."""
        if prefix is None:
            return [None] * count
        self._check_prefix(prefix)
        if prefix.batch_size == 1:
            return [prefix] * count
        if prefix.batch_size != count:
            raise ValueError(
                f"prefix: expected one row{f' or {count}' if count > 1 else ''}, for "
                f"as many texts, got {prefix.batch_size}"
            )
        return [prefix.take([i]) for i in range(count)]

    def _encode(self, name: str, prompt: Prompt, prefix: Prefix | None) -> list[int]:
        """The tokens of a prompt, checked."""
        if isinstance(prompt, str | bytes):
            return self._require_tokenizer().encode(prompt, add_bos=prefix is None)
        tokens = check.token_ids(name, prompt, self.model.config.vocab_size)
        if not tokens and prefix is None:
            raise ValueError(
                f"{name}: expected at least one token, got none; start from the begin "
                "token"
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
        mask[check.token_ids("end_tokens", end_tokens, vocab_size)] = True
        return mask


def _samples(generation: Generation) -> Iterator[tuple[int, Sample]]:
    """The sample of each request, by its index, as they finish."""
    parts: dict[int, list[Part]] = {}
    for part in generation:
        index = part.request.index
        parts.setdefault(index, []).append(part)
        if not part.is_last:
            continue
        row = parts.pop(index)
        kept = [one.logits for one in row if one.logits is not None]
        sample = Sample(
            text="".join(one.text for one in row),
            prompt_tokens=part.request.prompt_tokens,
            tokens=[token for one in row for token in one.tokens],
            log_probs=np.concatenate([one.log_probs for one in row]),
            ended=part.ended,
            num_calls=sum(one.num_calls for one in row),
            logits=np.concatenate(kept) if kept else None,
        )
        yield index, sample


def _count(name: str, value) -> int:
    return check.integer(name, value, least=1, most=check.MAX_COUNT)


def _is_list(value) -> bool:
    return isinstance(value, Sequence | np.ndarray) and check.is_series(value)


def _each(name: str, values, count: int, check_one) -> list[int]:
    """One checked value for each of `count`; a single one holds for all."""
    if _is_list(values):
        if len(values) != count:
            raise ValueError(
                f"{name}: expected one for each of the {count} rows, got {len(values)}"
            )
        return [check_one(name, value) for value in values]
    return [check_one(name, values)] * count
