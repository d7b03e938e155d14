"""Text in, text out: prompts are read in chunks, tokens drawn in blocks.

All of a prompt but its last token is read in chunks of three sizes, so that a new
prompt length compiles nothing; a ragged batch is as long as its longest row. Then the
host calls one decode block after another (see `recurrentgemma.decoding`) and looks at
the tokens between them. Neither the cache nor the programs grow with the text.
"""

import dataclasses
import numbers
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma.decoding import (
    BLOCK_STEPS,
    CHUNK_SIZES,
    BlockOutput,
    DecodeState,
    decode_block,
    new_cache,
    plan_chunks,
    read_chunk,
)
from recurrentgemma.griffin import Griffin
from recurrentgemma.sampling import Sampling, check_seed
from recurrentgemma.tokenizer import END_OF_TURN, Tokenizer

MIN_CAPACITY = 128
"""Least size of a global-attention cache; others are this times a power of two."""

# Streaming: steps before the first text, and how often text should come after it.
_FIRST_STEPS = 4
_STREAM_INTERVAL_S = 0.1

Progress = Callable[[int, int], None]
"""Called while a prompt is read with the tokens read so far and in all (a row)."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was generated for one prompt."""

    text: str
    """The generated text without its end token, after the prompt if echoed; empty if
    the sampler has no tokenizer."""
    prompt_tokens: list[int]
    """The prompt as the model read it."""
    tokens: list[int]
    """The generated tokens, the end token included."""
    log_probs: np.ndarray
    """Log-probability of each of `tokens` under the model, before temperature and
    filters; float32, natural logarithm."""
    ended: bool
    """Whether the last token is an end token."""
    logits: np.ndarray | None = None
    """The logits each of `tokens` was chosen from, float32 [len(tokens), V], if asked
    for."""


class _Block:
    """A block's output on the host, by row, without the steps after a row's end."""

    def __init__(self, output: BlockOutput, drawn: np.ndarray):
        def by_row(values):
            values = np.asarray(values)
            return [values[:count, i] for i, count in enumerate(drawn)]

        self.tokens = [tokens.tolist() for tokens in by_row(output.tokens)]
        self.log_probs = by_row(output.log_probs)
        self.logits = None if output.logits is None else by_row(output.logits)


class Sampler:
    """Generates text with a model.

    A row's text depends on its own prompt and seed, never on the other rows. The model
    is never changed; each call keeps its cache to itself.

    Example:
      >>> model, tokenizer = load("nano")
      >>> sampler = Sampler(model, tokenizer)
      >>> [sample] = sampler(["def "], max_new_tokens=50)
      >>> for piece in sampler.stream("import ", max_new_tokens=1000):
      ...     print(piece, end="")
    """

    def __init__(
        self,
        model: Griffin,
        tokenizer: Tokenizer | None = None,
        *,
        compile_ahead: bool = True,
    ):
        """Compiles nothing yet.

        Args:
          model: the model, its layers not stacked.
          tokenizer: needed for text; `generate_tokens` works without one.
          compile_ahead: the first call with a batch size compiles the programs of all
            chunk sizes at once, so that no later prompt length compiles anything.
            False compiles each when it is needed first: for a single prompt.

        Raises:
          ValueError: the tokenizer has more pieces than the model has embeddings.
        """
        vocab_size = model.config.vocab_size
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer: expected at most the {vocab_size} pieces that the model "
                f"has embeddings for, got {tokenizer.vocab_size}; use the tokenizer "
                "that the model was trained with"
            )
        self.model = model
        self.tokenizer = tokenizer
        self._compile_ahead = compile_ahead
        self._compiled: set[tuple[int, int | None]] = set()

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 100,
        sampling: Sampling = Sampling(),
        seed: int | Sequence[int] = 0,
        echo: bool = False,
        end_tokens: Sequence[int] | None = None,
        return_logits: bool = False,
        progress: Progress | None = None,
    ) -> list[Sample]:
        """Continues every prompt.

        Args:
          prompts: texts; an empty one starts from the begin token alone.
          max_new_tokens: most tokens to generate for each, at least 1.
          sampling: how tokens are chosen.
          seed: one for each row; an int s means s + i for row i. In [0, 2**32).
          echo: whether `Sample.text` begins with the prompt.
          end_tokens: ids that end a row; None means the tokenizer's end token and, if
            it has one, <end_of_turn>. An empty list never ends.
          return_logits: whether `Sample.logits` is kept (4 V bytes a token).
          progress: called while the prompts are read.

        Returns:
          A `Sample` for each prompt.

        Raises:
          ValueError: an argument is out of its range, or there is no tokenizer.
        """
        if isinstance(prompts, str):
            raise ValueError(  # noqa: TRY004 - all wrong arguments are ValueErrors
                f"prompts: expected a list of texts, got {prompts!r:.40}"
            )
        tokenizer = self._require_tokenizer()
        samples = self.generate_tokens(
            [tokenizer.encode(prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            end_tokens=end_tokens,
            return_logits=return_logits,
            progress=progress,
        )
        if not echo:
            return samples
        return [
            dataclasses.replace(s, text=prompt + s.text)
            for prompt, s in zip(prompts, samples, strict=True)
        ]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 100,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        echo: bool = False,
        end_tokens: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[str]:
        """Continues one prompt and yields the text as it comes.

        Joined, the pieces are the text that a call with the same arguments returns.
        They never split a character; memory does not grow with `max_new_tokens`.

        Args: as for a call; see there.

        Returns:
          An iterator of texts that are not empty.

        Raises:
          ValueError: as for a call, at once.
        """
        tokenizer = self._require_tokenizer()
        # Not in the generator below: errors are for the caller, not for the first use.
        blocks = self._generate(
            self._check_prompts([tokenizer.encode(prompt)]),
            _check_count("max_new_tokens", max_new_tokens),
            sampling,
            _row_seeds(seed, 1),
            end_mask := self._end_mask(end_tokens),
            progress=progress,
            interval_s=_STREAM_INTERVAL_S,
        )

        def pieces():
            if echo:
                yield prompt
            decoder = tokenizer.stream_decoder()
            for block in blocks:
                tokens = block.tokens[0]
                yield decoder.push(tokens[:-1] if _ended(tokens, end_mask) else tokens)
            yield decoder.flush()

        return (piece for piece in pieces() if piece)

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 100,
        sampling: Sampling = Sampling(),
        seed: int | Sequence[int] = 0,
        end_tokens: Sequence[int] | None = None,
        return_logits: bool = False,
        progress: Progress | None = None,
    ) -> list[Sample]:
        """Continues every list of tokens.

        Args: as for a call, but `prompts` holds token ids, each list at least one (the
          begin token first, usually). Without a tokenizer `end_tokens` must be given.

        Returns:
          A `Sample` for each prompt.

        Raises:
          ValueError: an argument is out of its range; a prompt has no tokens, or a
            token that is not in the vocabulary.
        """
        rows = self._check_prompts(prompts)
        end_mask = self._end_mask(end_tokens)
        blocks = list(
            self._generate(
                rows,
                _check_count("max_new_tokens", max_new_tokens),
                sampling,
                _row_seeds(seed, len(rows)),
                end_mask,
                keep_logits=return_logits,
                progress=progress,
            )
        )
        samples = []
        for i, prompt in enumerate(rows):
            tokens = [token for block in blocks for token in block.tokens[i]]
            ended = _ended(tokens, end_mask)
            text = ""
            if self.tokenizer is not None:
                text = self.tokenizer.decode(tokens[:-1] if ended else tokens)
            log_probs = np.concatenate([block.log_probs[i] for block in blocks])
            kept = [block.logits[i] for block in blocks if block.logits is not None]
            logits = np.concatenate(kept) if kept else None
            samples.append(Sample(text, prompt, tokens, log_probs, ended, logits))
        return samples

    def _generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: np.ndarray,
        end_mask: np.ndarray,
        *,
        keep_logits: bool = False,
        progress: Progress | None = None,
        interval_s: float | None = None,
    ) -> Iterator[_Block]:
        """The tokens of all rows, block by block; `interval_s` apart if given."""
        state = self._prefill(prompts, max_new_tokens, progress)
        steps = np.zeros(len(prompts), np.int32)
        end_mask_on_device = jnp.asarray(end_mask)
        count = BLOCK_STEPS if interval_s is None else _FIRST_STEPS
        drawn = 0
        while drawn < max_new_tokens:
            count = min(count, max_new_tokens - drawn)
            start = time.perf_counter()
            state, output = decode_block(
                self.model,
                state,
                seeds,
                sampling,
                end_mask_on_device,
                np.int32(count),
                keep_logits=keep_logits,
            )
            # Rows that have ended draw nothing.
            new_steps, done = np.asarray(state.steps), np.asarray(state.done)
            yield _Block(output, new_steps - steps)
            steps, drawn = new_steps, drawn + count
            if done.all():
                return
            if interval_s is not None:
                rate = count / (time.perf_counter() - start)
                count = max(1, min(BLOCK_STEPS, int(rate * interval_s)))

    def _prefill(self, prompts, max_new_tokens, progress) -> DecodeState:
        """The state after all tokens of each prompt but the last."""
        lengths = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
        longest = int(lengths.max())
        capacity = self._capacity(longest + max_new_tokens)
        cache = new_cache(self.model, batch_size=len(prompts), capacity=capacity)
        if self._compile_ahead and (len(prompts), capacity) not in self._compiled:
            for size in CHUNK_SIZES:
                shape = jax.ShapeDtypeStruct((len(prompts), size), jnp.int32)
                read_chunk.lower(self.model, cache, shape, lengths).compile()
            self._compiled.add((len(prompts), capacity))
        start = 0
        for size in plan_chunks(longest):
            tokens = np.zeros((len(prompts), size), np.int32)
            for row, prompt in zip(tokens, prompts, strict=True):
                piece = prompt[start : min(start + size, len(prompt) - 1)]
                row[: len(piece)] = piece
            read = np.clip(lengths - start, 0, size)
            cache = read_chunk(self.model, cache, tokens, read)
            start += size
            if progress is not None:
                jax.block_until_ready(cache.next_position)
                progress(min(start, longest), longest)
        zeros = np.zeros(len(prompts), np.int32)
        last = np.array([prompt[-1] for prompt in prompts], np.int32)
        return DecodeState(
            cache, jnp.asarray(last), jnp.asarray(zeros), jnp.asarray(zeros > 0)
        )

    def _capacity(self, tokens: int) -> int | None:
        """Slots of global attention for a text; few sizes, so few compilations."""
        if "global_attention" not in self.model.config.block_types:
            return None
        capacity = MIN_CAPACITY
        while capacity < tokens:
            capacity *= 2
        return capacity

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: expected one to work with text, got None; pass it to "
                "Sampler, or use generate_tokens"
            )
        return self.tokenizer

    def _check_prompts(self, prompts) -> list[list[int]]:
        if len(prompts) == 0:
            raise ValueError("prompts: expected at least one, got none")
        vocab_size = self.model.config.vocab_size
        rows = [[int(token) for token in prompt] for prompt in prompts]
        for i, row in enumerate(rows):
            if not row:
                raise ValueError(
                    f"prompts[{i}]: expected at least one token, got none; start from "
                    "the begin token"
                )
            if not 0 <= min(row) <= max(row) < vocab_size:
                wrong = next(t for t in row if not 0 <= t < vocab_size)
                raise ValueError(
                    f"prompts[{i}]: expected tokens in [0, {vocab_size}), got {wrong}"
                )
        return rows

    def _end_mask(self, end_tokens) -> np.ndarray:
        """bool [V], true at the end tokens: which they are compiles nothing."""
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


def _ended(tokens: Sequence[int], end_mask: np.ndarray) -> bool:
    return len(tokens) > 0 and bool(end_mask[tokens[-1]])


def _check_count(name: str, value) -> int:
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return int(value)


def _row_seeds(seed, rows: int) -> np.ndarray:
    """uint32 [rows]."""
    if isinstance(seed, numbers.Integral):
        seeds = [check_seed(seed) + i for i in range(rows)]
    else:
        seeds = list(seed)
        if len(seeds) != rows:
            raise ValueError(
                f"seed: expected one for each of the {rows} rows, got {len(seeds)}"
            )
    return np.array([check_seed(s) for s in seeds], np.uint32)
