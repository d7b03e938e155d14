"""Requests into tokens: rows in slots, block by block, finished rows replaced.

The host reads the first requests together, then calls one decode block after another.
Between blocks it looks at the tokens: it cuts rows at stop strings, hands out what is
new, and gives the slot of a finished row to the next request. All rows are of one size,
so that this is one copy, and no row sees another.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.generation.chunk_reader import (
    ChunkReader,
    Progress,
    make_room,
    same_room,
)
from recurrentgemma.generation.history import History
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.programs import (
    BLOCK_STEPS,
    BlockOutput,
    DecodeState,
    decode_block,
    place_row,
)
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.generation.speculation import speculate_block
from recurrentgemma.generation.stop_strings import TextUntilStop
from recurrentgemma.inspect import generating
from recurrentgemma.tokenizer import Tokenizer

# Streaming: steps before the first text, and how often text should come after it.
_FIRST_STEPS = 4
_STREAM_INTERVAL_S = 0.1

_make_rewindable = jax.jit(cache_lib.make_rewindable, static_argnums=(1, 2))


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


_BLANK = Request(0, [0], max_new_tokens=1, seed=0)
"""The content of a slot before its first request."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What a block gave to a row."""

    request: Request
    text: str
    """Empty without a tokenizer; never splits a character, ends before a stop string."""
    tokens: list[int]
    log_probs: np.ndarray
    """float32 [len(tokens)]."""
    logits: np.ndarray | None
    """float32 [len(tokens), V], if kept."""
    num_calls: int
    """Calls of the model that the tokens took; fewer than tokens with a draft."""
    is_last: bool
    """Whether the row is finished."""
    ended: bool
    """Whether an end token or a stop string ended the row here."""


class _Row:
    """A request in a slot."""

    def __init__(self, request: Request, settings: "Settings"):
        self._request = request
        self._end_mask = settings.end_mask
        self._text = None
        if settings.tokenizer is not None:
            self._text = TextUntilStop(settings.tokenizer, settings.stop)

    def take(self, output: BlockOutput, slot: int, count: int, is_done: bool) -> Part:
        """The row's share of a block, cut at a stop string."""
        tokens = np.asarray(output.tokens)[slot, :count].tolist()
        ended = bool(tokens) and bool(self._end_mask[tokens[-1]])
        text = ""
        if self._text is not None:
            shown = self._text.push(tokens[:-1] if ended else tokens)
            text = shown.text
            if shown.stopped_after is not None:
                tokens, ended = tokens[: shown.stopped_after], True
            elif is_done:
                text += self._text.flush()
        count = len(tokens)
        logits = output.logits
        return Part(
            request=self._request,
            text=text,
            tokens=tokens,
            log_probs=np.asarray(output.log_probs)[slot, :count],
            logits=None if logits is None else np.asarray(logits[slot, :count]),
            num_calls=int(output.calls[slot]),
            is_last=is_done or ended,
            ended=ended,
        )


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


class Generation:
    """One run of requests through a batch of slots; an iterator of parts."""

    def __init__(
        self,
        readers: Sequence[ChunkReader],
        settings: Settings,
        requests: Iterable[Request],
        batch_size: int,
        *,
        reads_together: bool = False,
        progress: Progress | None = None,
    ):
        """Reads nothing yet.

        Args:
          readers: the model and, if there is one, the draft: a smaller model of the
            same tokens that proposes them.
          settings: common to all rows.
          requests: taken one by one, as slots become free. Where taking one fails, the
            rows before it are finished first.
          batch_size: number of slots; fewer if there are fewer requests.
          reads_together: whether all requests, at most `batch_size`, are read as one
            batch. Otherwise each is read alone: nothing is padded to the longest.
          progress: called while requests are read.
        """
        self._readers = readers
        self._models = tuple(generating(reader.model) for reader in readers)
        self._settings = settings
        self._failures: list[Exception] = []
        self._waiting = _until_failure(requests, self._failures)
        self._batch_size = batch_size
        self._reads_together = reads_together
        self._progress = progress
        self._state: DecodeState | None = None
        self._rows: list[_Row | None] = []

    def __iter__(self) -> Iterator[Part]:
        first = list(itertools.islice(self._waiting, self._batch_size))
        if first and self._reads_together:
            self._state = self._read(first)
            self._rows = [_Row(request, self._settings) for request in first]
        elif first:
            self._state = self._read([_BLANK] * len(first))
            self._rows = [None] * len(first)
            self._waiting = itertools.chain(first, self._waiting)
        count = _FIRST_STEPS if self._settings.streams else BLOCK_STEPS
        while True:
            for slot, row in enumerate(self._rows):
                if row is None and (request := next(self._waiting, None)):
                    self._place(slot, request)
            idle = self._rows.count(None)
            if idle == len(self._rows):
                break
            # A slot that becomes free is filled at once while there are requests.
            no_more = idle or self._reads_together
            start = time.perf_counter()
            yield from self._decode(count, len(self._rows) if no_more else 1)
            if self._settings.streams:
                rate = count / (time.perf_counter() - start)
                count = max(1, min(BLOCK_STEPS, int(rate * _STREAM_INTERVAL_S)))
            for reader in self._readers:
                reader.compile_rest()
        if self._failures:
            raise self._failures[0]

    def close(self) -> None:
        """Frees the memory of the rows; nothing more comes."""
        self._state, self._rows, self._waiting = None, [], iter(())

    def prefix(self, slot: int, model_digest: str) -> Prefix:
        """A copy of what a slot has read and written so far.

        Raises:
          ValueError: nothing was read yet, or the run was closed.
        """
        if self._state is None:
            raise ValueError(
                "stream: expected one under way for its prefix, got one that is not "
                "begun or is closed; take the first text first"
            )
        cache = cache_lib.take(self._state.caches[0], [slot])
        if self._settings.num_draft_tokens:
            cache = _make_rewindable(cache, self._models[0].config, 0)
        rows = (np.array(leaf[slot : slot + 1]) for leaf in self._state.history)
        return Prefix(cache, History(*rows), model_digest)

    def _decode(self, count: int, stop_at: int) -> list[Part]:
        """One block; the parts of all rows."""
        state, settings = self._state, self._settings
        assert state is not None
        before = np.array(state.steps)
        run: Callable = functools.partial(decode_block, self._models[0])
        if settings.num_draft_tokens:
            run = functools.partial(
                speculate_block,
                self._models,
                num_draft_tokens=settings.num_draft_tokens,
            )
        state, output = run(
            state,
            settings.sampling,
            settings.end_mask,
            np.int32(count),
            np.int32(stop_at),
            keep_logits=settings.keep_logits,
        )
        drawn, done = np.asarray(state.steps) - before, np.array(state.done)
        # The logits, which may be large, are taken row by row.
        output = output._replace(
            tokens=np.asarray(output.tokens),
            log_probs=np.asarray(output.log_probs),
            calls=np.asarray(output.calls),
        )
        parts = []
        for slot, row in enumerate(self._rows):
            if row is None:
                continue
            part = row.take(output, slot, drawn[slot], bool(done[slot]))
            parts.append(part)
            if part.is_last:
                done[slot] = True
                self._rows[slot] = None
        self._state = state._replace(done=jnp.asarray(done))
        return parts

    def _place(self, slot: int, request: Request) -> None:
        """Reads a request into a slot that is free."""
        state, row = self._state, self._read([request])
        assert state is not None
        # Global attention: the longer of the two sets the size.
        pairs = [
            same_room(pair, model.config)
            for model, *pair in zip(self._models, state.caches, row.caches, strict=True)
        ]
        caches, new = zip(*pairs, strict=True)
        self._state = place_row(
            state._replace(caches=caches), row._replace(caches=new), np.int32(slot)
        )
        self._rows[slot] = _Row(request, self._settings)

    def _read(self, requests: list[Request]) -> DecodeState:
        """The state after all tokens of each request but the last."""
        vocab_size = self._models[0].config.vocab_size
        num_draft_tokens = self._settings.num_draft_tokens
        read = [request.read(vocab_size) for request in requests]
        unread = [tokens for tokens, _ in read]
        history = History.concatenate([after for _, after in read])
        limits = np.array([request.max_new_tokens for request in requests], np.int32)
        room = int(max(history.num_tokens + limits)) + num_draft_tokens
        # The draft knows the prompt, but not the prefix: no text depends on it.
        caches = [self._starting_cache(requests, room)]
        caches += [
            reader.new_cache(len(requests), room) for reader in self._readers[1:]
        ]
        for i, reader in enumerate(self._readers):
            progress = self._progress if i == 0 else None
            caches[i] = reader.read(caches[i], unread, progress)
            if num_draft_tokens:
                config = reader.model.config
                caches[i] = _make_rewindable(caches[i], config, num_draft_tokens)
        zeros = jnp.zeros(len(requests), jnp.int32)
        return DecodeState(
            caches=tuple(caches),
            history=jax.tree.map(jnp.asarray, history),
            seeds=jnp.array([request.seed for request in requests], jnp.uint32),
            steps=zeros,
            limits=jnp.asarray(limits),
            done=zeros > 0,
        )

    def _starting_cache(self, requests: list[Request], room: int) -> Cache:
        """A new cache with the prefix of each request, and room for so many tokens."""
        reader = self._readers[0]
        prefixes = [request.prefix for request in requests]
        if not any(prefixes):
            return reader.new_cache(len(requests), room)
        caches = [
            reader.new_cache(1, room)
            if prefix is None
            else make_room(prefix.cache, reader.model.config, room)
            for prefix in prefixes
        ]
        if all(prefix is prefixes[0] for prefix in prefixes) and len(prefixes) > 1:
            return cache_lib.repeat(caches[0], len(caches))
        if len(caches) > 1:
            return cache_lib.concatenate(same_room(caches, reader.model.config))
        return jax.tree.map(jnp.copy, caches[0])


def _until_failure(
    requests: Iterable[Request], failures: list[Exception]
) -> Iterator[Request]:
    # No method: a run that refers to itself would keep its memory when it is abandoned.
    try:
        yield from requests
    except Exception as error:  # noqa: BLE001  the run raises it at its end
        failures.append(error)
