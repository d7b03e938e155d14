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
from recurrentgemma.generation import prefill
from recurrentgemma.generation.batching import Generation, TextStream
from recurrentgemma.generation.chunk_reader import ChunkReader, Progress
from recurrentgemma.generation.prefill import Piece, Text
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.requests import (
    Inputs,
    Prompt,
    Request,
    num_bytes,
    positive,
)
from recurrentgemma.generation.results import Sample, Score
from recurrentgemma.generation.sampling import Sampling, check_seed
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer


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

        The programs of the last eight batch sizes stay in memory (tens of MB each for a
        small model); `jax.clear_caches()` frees them all.

        Raises:
          ValueError: the tokenizer has more pieces than the model has embeddings; the
            draft has another vocabulary; num_draft_tokens is out of its range.
        """
        check.boolean("compile_ahead", compile_ahead)
        self._inputs = Inputs(model, tokenizer, draft, num_draft_tokens)
        self.model = model
        self.tokenizer = tokenizer
        self.draft = draft
        self.num_draft_tokens = num_draft_tokens
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
        check.boolean("return_logits", return_logits)
        check.function("progress", progress)
        asked = self._inputs.requests(
            prompts, max_new_tokens, seed, num_samples, prefix
        )
        rows = sum(map(len, asked))
        if batch_size is not None:
            batch_size = positive("batch_size", batch_size)
        settings = self._inputs.settings(
            sampling, end_tokens, stop, keep_logits=return_logits
        )
        run = Generation(
            self._readers,
            settings,
            itertools.chain(*asked) if rows == len(asked) else self._forked(asked),
            batch_size if batch_size is not None and batch_size < rows else None,
            progress=progress,
        )
        samples = dict(run.samples())
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
        self._inputs.tokenizer()
        check.function("progress", progress)
        [row] = self._inputs.prefix_rows(prefix, 1)
        tokens = self._inputs.tokens("prompt", prompt, begin=row is None)
        limit = positive("max_new_tokens", max_new_tokens)
        request = Request(0, tokens, limit, check_seed(seed), row)
        settings = self._inputs.settings(sampling, end_tokens, stop, streams=True)
        _, history = request.read(self._inputs.vocab_size)
        run = Generation(self._readers, settings, [request], progress=progress)
        return TextStream(run, history, self._inputs.model_digest())

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
        requests = self._inputs.endless(prompts, max_new_tokens, seed)
        settings = self._inputs.settings(sampling, end_tokens, stop)
        slots = positive("batch_size", batch_size)
        return Generation(self._readers, settings, requests, slots).samples()

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
        return prefill.read(*self._open(text, prefix), progress)

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
        slots = positive("batch_size", batch_size)
        [before] = self._inputs.prefix_rows(prefix, 1)
        held = [] if before is None else before.history.last_token.tolist()
        rows, sizes = [], []
        for i, text in enumerate(texts):
            tokens = self._inputs.tokens(f"texts[{i}]", text, begin=before is None)
            rows.append([*held, *tokens])
            sizes.append(num_bytes(text))
        scores = prefill.score_rows(self._readers[0], rows, slots, before, progress)
        return [
            Score(row[1:], log_probs, size)
            for row, log_probs, size in zip(rows, scores, sizes, strict=True)
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
        return prefill.score(*self._open(text, prefix))

    def _open(self, text: Text, prefix: Prefix | None):
        """The arguments of a reader of a text."""
        [row] = self._inputs.prefix_rows(prefix, 1)
        pieces = prefill.pieces_of(text, self._inputs, begin=row is None)
        return self._readers[0], pieces, row, self._inputs.model_digest()

    def _forked(self, asked: list[list[Request]]) -> Iterator[Request]:
        """All copies of each request, whose prompt is read once: before the first."""
        digest = self._inputs.model_digest()
        for copies in asked:
            pieces = [Piece(copies[0].prompt_tokens, None)]
            before = copies[0].prefix
            prefix = prefill.read(self._readers[0], pieces, before, digest)
            for request in copies:
                yield dataclasses.replace(request, prefix=prefix, is_read=True)
