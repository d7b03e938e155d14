"""Requests into tokens: rows in slots, block by block, finished rows replaced.

The host reads the first requests together, then calls one decode block after another.
Between blocks it looks at the tokens: it cuts rows at stop strings, hands out what is
new, and gives the slot of a finished row to the next request. All rows are of one size,
so that this is one copy, and no row sees another.
"""

import collections
import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.generation.chunk_reader import ChunkReader, Progress
from recurrentgemma.generation.history import History
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.programs import (
    BLOCK_STEPS,
    BlockOutput,
    DecodeState,
    decode_block,
    place_row,
)
from recurrentgemma.generation.requests import Request, Settings
from recurrentgemma.generation.results import Sample
from recurrentgemma.generation.speculation import speculate_block
from recurrentgemma.generation.stop_strings import TextUntilStop
from recurrentgemma.inspect import generating

# Streaming: steps before the first text, and how often text should come after it.
_FIRST_STEPS = 4
_STREAM_INTERVAL_S = 0.1

_make_rewindable = jax.jit(cache_lib.make_rewindable, static_argnums=(1, 2))

_BLANK = Request(0, [0], max_new_tokens=1, seed=0)
"""The content of a slot before its first request."""


class Part(NamedTuple):
    """What a block gave to a row."""

    request: Request
    piece: Sample
    """Its text never splits a character and ends before a stop string."""
    is_last: bool
    """Whether the row is finished."""


class _Row(NamedTuple):
    """A request in a slot."""

    request: Request
    text: TextUntilStop


class Generation:
    """One run of requests through a batch of slots; an iterator of parts."""

    def __init__(
        self,
        readers: Sequence[ChunkReader],
        settings: Settings,
        requests: Iterable[Request],
        batch_size: int | None = None,
        *,
        progress: Progress | None = None,
    ):
        """Reads nothing yet.

        Args:
          readers: the model and, if there is one, the draft model.
          settings: common to all rows.
          requests: taken one by one, as slots become free. Where taking one fails, the
            rows before it are finished first.
          batch_size: number of slots; fewer if there are fewer requests. Each request
            is read alone then: nothing is padded to the longest. None reads all
            requests as one batch.
          progress: called while requests are read.
        """
        self._readers = readers
        self._models = tuple(generating(reader.model) for reader in readers)
        self.settings = settings
        self._failures: list[Exception] = []
        self._waiting = _until_failure(requests, self._failures)
        self._batch_size = batch_size
        self._progress = progress
        self._state: DecodeState | None = None
        self._rows: list[_Row | None] = []

    def __iter__(self) -> Iterator[Part]:
        first = list(itertools.islice(self._waiting, self._batch_size))
        if first and self._batch_size is None:
            self._state = self._read(first)
            self._rows = [self._row(request) for request in first]
        elif first:
            self._state = self._read([_BLANK] * len(first))
            self._rows = [None] * len(first)
            self._waiting = itertools.chain(first, self._waiting)
        count = _FIRST_STEPS if self.settings.streams else BLOCK_STEPS
        while True:
            for slot, row in enumerate(self._rows):
                if row is None and (request := next(self._waiting, None)):
                    self._place(slot, request)
            idle = self._rows.count(None)
            if idle == len(self._rows):
                break
            # A slot that becomes free is filled at once while there are requests.
            no_more = idle or self._batch_size is None
            start = time.perf_counter()
            yield from self._decode(count, len(self._rows) if no_more else 1)
            if self.settings.streams:
                rate = count / (time.perf_counter() - start)
                count = max(1, min(BLOCK_STEPS, int(rate * _STREAM_INTERVAL_S)))
            for reader in self._readers:
                reader.compile_rest()
        if self._failures:
            raise self._failures[0]

    def samples(self) -> Iterator[tuple[int, Sample]]:
        """The sample of each request, by its index, as they finish."""
        pieces = collections.defaultdict(list)
        for request, piece, is_last in self:
            pieces[request.index].append(piece)
            if is_last:
                yield request.index, Sample.join(pieces.pop(request.index))

    def close(self) -> None:
        """Frees the memory of the rows; nothing more comes."""
        self._state, self._rows, self._waiting = None, [], iter(())

    def cache(self, slot: int) -> Cache:
        """A copy of the model's cache after what a slot has read and written so far."""
        if self._state is None:
            raise ValueError(
                "stream: expected one under way for its prefix, got one that is not "
                "begun or is closed; take the first text first"
            )
        cache = cache_lib.take(self._state.caches[0], [slot])
        if self.settings.num_draft_tokens:
            cache = _make_rewindable(cache, self._models[0].config, 0)
        return cache

    def _decode(self, count: int, stop_at: int) -> list[Part]:
        """One block; the parts of all rows."""
        state, settings = self._state, self.settings
        assert state is not None
        before = np.array(state.steps)
        run, count_of_draft = decode_block, settings.num_draft_tokens
        if count_of_draft:
            run = functools.partial(speculate_block, num_draft_tokens=count_of_draft)
        state, output = run(
            self._models,
            state,
            settings.sampling,
            settings.end_mask,
            np.int32(count),
            np.int32(stop_at),
            keep_logits=settings.keep_logits,
        )
        drawn, done = np.asarray(state.steps) - before, np.array(state.done)
        # The logits, which may be large, are taken row by row.
        logits = output.logits
        output = jax.device_get(output._replace(logits=None))._replace(logits=logits)
        parts = []
        for slot, row in enumerate(self._rows):
            if row is None:
                continue
            part = self._part(row, slot, output, drawn[slot], bool(done[slot]))
            parts.append(part)
            if part.is_last:
                done[slot] = True
                self._rows[slot] = None
        self._state = state._replace(done=jnp.asarray(done))
        return parts

    def _part(
        self, row: _Row, slot: int, output: BlockOutput, count: int, is_done: bool
    ) -> Part:
        """The row's share of a block, cut at a stop string."""
        tokens = np.asarray(output.tokens)[slot, :count].tolist()
        ended = bool(tokens) and bool(self.settings.end_mask[tokens[-1]])
        text, stopped = row.text.push(tokens[:-1] if ended else tokens)
        if stopped is not None:
            tokens, ended = tokens[:stopped], True
        elif is_done:
            text += row.text.flush()
        count, logits = len(tokens), output.logits
        piece = Sample(
            text=text,
            prompt_tokens=row.request.prompt_tokens,
            tokens=tokens,
            log_probs=np.asarray(output.log_probs)[slot, :count],
            ended=ended,
            num_calls=int(output.calls[slot]),
            logits=None if logits is None else np.asarray(logits[slot, :count]),
        )
        return Part(row.request, piece, is_done or ended)

    def _row(self, request: Request) -> _Row:
        text = TextUntilStop(self.settings.tokenizer, self.settings.stop)
        return _Row(request, text)

    def _place(self, slot: int, request: Request) -> None:
        """Reads a request into a slot that is free."""
        state, row = self._state, self._read([request])
        assert state is not None
        # Global attention: the longer of the two sets the size.
        pairs = [
            reader.same_room(pair)
            for reader, *pair in zip(
                self._readers, state.caches, row.caches, strict=True
            )
        ]
        caches, new = zip(*pairs, strict=True)
        self._state = place_row(
            state._replace(caches=caches), row._replace(caches=new), np.int32(slot)
        )
        self._rows[slot] = self._row(request)

    def _read(self, requests: list[Request]) -> DecodeState:
        """The state after all tokens of each request but the last."""
        vocab_size = self._models[0].config.vocab_size
        num_draft_tokens = self.settings.num_draft_tokens
        read = [request.read(vocab_size) for request in requests]
        unread = [tokens for tokens, _ in read]
        history = History.concatenate([after for _, after in read])
        limits = np.array([request.max_new_tokens for request in requests], np.int32)
        room = int(max(history.num_tokens + limits)) + num_draft_tokens
        if self.settings.sampling.repetition_penalty is None:
            history = history._replace(seen=None)
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
        """A new cache with the prefixes, which all requests have or none, and room for
        so many tokens."""
        reader = self._readers[0]
        caches = [
            reader.make_room(request.prefix.cache, room)
            for request in requests
            if request.prefix is not None
        ]
        if not caches:
            return reader.new_cache(len(requests), room)
        joined = cache_lib.concatenate(reader.same_room(caches))
        return joined if len(caches) > 1 else jax.tree.map(jnp.copy, joined)


def _until_failure(
    requests: Iterable[Request], failures: list[Exception]
) -> Iterator[Request]:
    # No method: a run that refers to itself would keep its memory when it is abandoned.
    try:
        yield from requests
    except Exception as error:  # noqa: BLE001  the run raises it at its end
        failures.append(error)


class TextStream(Iterator[str]):
    """The text of one prompt as it comes; pieces that never split a character.

    Joined, the pieces are the text of a call with the same arguments. The memory does
    not grow with the text.
    """

    def __init__(self, generation: Generation, history: History, model_digest: str):
        """`history` is that of the prompt; the run has one request."""
        self._generation = generation
        self._parts = iter(generation)
        self._history = history
        self._model_digest = model_digest
        self.ended = False
        """Whether an end token or a stop string has come."""

    def __next__(self) -> str:
        while True:
            piece = next(self._parts).piece
            self.ended = piece.ended
            _, self._history = self._history.read(piece.tokens)
            if piece.text:
                return piece.text

    def close(self) -> None:
        """Frees the memory of the text; the stream ends, without a prefix."""
        self._parts = iter(())
        self._generation.close()

    def prefix(self) -> Prefix:
        """The prompt and what was written so far, to continue from.

        Raises:
          ValueError: there are stop strings, past which the model has read already;
            nothing was taken from the stream yet; or it was closed.
        """
        if self._generation.settings.stop:
            raise ValueError(
                "stop: expected none for a prefix, as the model reads past a stop "
                "string; continue from the text instead"
            )
        return Prefix(self._generation.cache(0), self._history, self._model_digest)
