"""Requests into tokens: rows in slots, block by block, finished rows replaced.

The host reads the first requests together, then calls one decode block after another.
Between blocks it looks at the tokens: it cuts rows at stop strings, hands out what is
new, and gives the slot of a finished row to the next request. All rows are of one size,
so that this is one copy, and no row sees another.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.generation.prefill import (
    Progress,
    capacity_for,
    compile_chunks,
    make_room,
    read_rows,
)
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.programs import (
    BLOCK_STEPS,
    BlockOutput,
    DecodeState,
    decode_block,
    new_cache,
    place_row,
)
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.generation.speculation import speculate_block
from recurrentgemma.generation.stop_strings import TextUntilStop
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer

# Streaming: steps before the first text, and how often text should come after it.
_FIRST_STEPS = 4
_STREAM_INTERVAL_S = 0.1

_make_rewindable = jax.jit(cache_lib.make_rewindable, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to continue."""

    tokens: list[int]
    """To read first, after the prefix if there is one."""
    max_new_tokens: int
    seed: int
    prefix: Prefix | None = None
    """One row, already read."""

    @property
    def fed(self) -> list[int]:
        """All tokens that the cache of the prefix has not seen; at least one."""
        held = [] if self.prefix is None else self.prefix.last_token.tolist()
        return [*held, *self.tokens]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix and the prompt."""
        read = 0 if self.prefix is None else int(self.prefix.num_tokens[0])
        return read + len(self.tokens)

    def seen(self, vocab_size: int) -> np.ndarray:
        """bool [1, V], which tokens the prefix and the prompt hold."""
        seen = np.zeros((1, vocab_size), bool)
        seen[0, self.tokens] = True
        return seen if self.prefix is None else seen | self.prefix.seen


_BLANK = Request([0], max_new_tokens=1, seed=0)
"""Of a slot before its first request."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What a block gave to a row."""

    index: int
    """Of the request."""
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
    ended: bool
    """Whether an end token or a stop string ended the row here."""


class _Row:
    """A request in a slot."""

    def __init__(self, index: int, request: Request, settings: "Settings"):
        self.index = index
        self.request = request
        self.is_stopped = False
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
                self.is_stopped = True
            elif is_done:
                text += self._text.flush()
        count = len(tokens)
        logits = output.logits
        return Part(
            index=self.index,
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
    """What all rows of a run have in common."""

    tokenizer: Tokenizer | None
    sampling: Sampling
    end_mask: np.ndarray
    """bool [V], true at the tokens that end a row: which they are compiles nothing."""
    stop: Sequence[str] = ()
    keep_logits: bool = False
    streams: bool = False
    """Whether parts should come several times a second."""
    draft: Griffin | None = None
    """A smaller model of the same tokens that proposes them."""
    num_draft_tokens: int = 0
    """How many it proposes at once."""


class Generation:
    """One run of requests through a batch of slots; an iterator of parts."""

    def __init__(
        self,
        model: Griffin,
        settings: Settings,
        requests: Iterable[Request],
        batch_size: int,
        *,
        compiled: set | None = None,
        progress: Progress | None = None,
    ):
        """Reads nothing yet.

        Args:
          model: the model.
          settings: common to all rows.
          requests: taken one by one, as slots become free.
          batch_size: number of slots; fewer if there are fewer requests.
          compiled: the (batch size, capacity) pairs whose chunk programs were compiled
            ahead, which is kept up to date; None compiles them as they are needed.
          progress: called while requests are read.
        """
        self._model = model
        self._settings = settings
        self._requests = enumerate(requests)
        self._batch_size = batch_size
        self._compiled = compiled
        self._progress = progress
        self._state: DecodeState | None = None
        self._rows: list[_Row | None] = []

    def __iter__(self) -> Iterator[Part]:
        first = list(itertools.islice(self._requests, self._batch_size))
        if not first:
            return
        waiting = next(self._requests, None)
        if waiting is None:
            self._state = self._read([request for _, request in first])
            self._rows = [_Row(i, request, self._settings) for i, request in first]
        else:
            # Every request is read alone, as those that come later are: nothing is
            # padded to the longest of a batch.
            self._state = self._read([_BLANK] * len(first))
            self._rows = [None] * len(first)
            self._requests = itertools.chain(first[1:], [waiting], self._requests)
            waiting = first[0]
        count = _FIRST_STEPS if self._settings.streams else BLOCK_STEPS
        while True:
            for slot, row in enumerate(self._rows):
                if row is None and waiting is not None:
                    self._place(slot, *waiting)
                    waiting = next(self._requests, None)
            idle = self._rows.count(None)
            if idle == len(self._rows):
                return
            # A slot that becomes free is filled at once while there are requests.
            stop_at = len(self._rows) if waiting is None else idle + 1
            start = time.perf_counter()
            yield from self._decode(count, stop_at)
            if self._settings.streams:
                rate = count / (time.perf_counter() - start)
                count = max(1, min(BLOCK_STEPS, int(rate * _STREAM_INTERVAL_S)))

    def read_so_far(self, slot: int) -> tuple[Cache, np.ndarray]:
        """A copy of a slot's cache, and its last token, int32 [1], not in the cache.

        Raises:
          ValueError: nothing was read yet.
        """
        if self._state is None:
            raise ValueError("Nothing was read yet: take the first text first.")
        cache = cache_lib.take(self._state.cache, [slot])
        if self._settings.draft is not None:
            cache = _make_rewindable(cache, self._model.config, 0)
        return cache, np.asarray(self._state.token)[slot : slot + 1]

    def _decode(self, count: int, stop_at: int) -> list[Part]:
        """One block; the parts of all rows."""
        state, settings = self._state, self._settings
        assert state is not None
        before = np.asarray(state.steps)
        arguments = (
            state,
            settings.sampling,
            settings.end_mask,
            np.int32(count),
            np.int32(stop_at),
        )
        if settings.draft is None:
            state, output = decode_block(
                self._model, *arguments, keep_logits=settings.keep_logits
            )
        else:
            state, output = speculate_block(
                self._model,
                settings.draft,
                *arguments,
                num_draft_tokens=settings.num_draft_tokens,
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

    def _place(self, slot: int, index: int, request: Request) -> None:
        """Reads a request into a slot that is free."""
        state, row = self._state, self._read([request])
        assert state is not None
        # Global attention: the longer of the two sets the size.
        draft = self._settings.draft
        for name, model in (("cache", self._model), ("draft_cache", draft)):
            if model is not None:
                caches = getattr(state, name), getattr(row, name)
                needed = max(map(_capacity, caches))
                state, row = (
                    old._replace(**{name: make_room(cache, model.config, needed)})
                    for old, cache in zip((state, row), caches, strict=True)
                )
        self._state = place_row(state, row, np.int32(slot))
        self._rows[slot] = _Row(index, request, self._settings)

    def _read(self, requests: list[Request]) -> DecodeState:
        """The state after all tokens of each request but the last."""
        rows = [request.fed for request in requests]
        unread = [row[:-1] for row in rows]
        cache = self._starting_cache(requests)
        pair = (len(rows), _capacity(cache))
        known = self._compiled
        if known is not None and requests[0] is not _BLANK and pair not in known:
            compile_chunks(self._model, cache)
            known.add(pair)
        cache = read_rows(self._model, cache, unread, self._progress)
        draft_cache = None
        if self._settings.draft is not None:
            cache, draft_cache = self._with_draft(cache, requests, unread)
        seen = None
        if self._settings.sampling.repetition_penalty is not None:
            vocab_size = self._model.config.vocab_size
            seen = np.concatenate([request.seen(vocab_size) for request in requests])
        zeros = jnp.zeros(len(rows), jnp.int32)
        return DecodeState(
            cache=cache,
            token=jnp.array([row[-1] for row in rows], jnp.int32),
            seeds=jnp.array([request.seed for request in requests], jnp.uint32),
            steps=zeros,
            limits=jnp.array([r.max_new_tokens for r in requests], jnp.int32),
            done=zeros > 0,
            seen=None if seen is None else jnp.asarray(seen),
            draft_cache=draft_cache,
        )

    def _with_draft(
        self, cache: Cache, requests: list[Request], unread: list[list[int]]
    ) -> tuple[Cache, Cache]:
        """The cache, made rewindable, and the draft's.

        The draft knows the prompt, but not the prefix: the text does not depend on it.
        """
        draft, count = self._settings.draft, self._settings.num_draft_tokens
        assert draft is not None
        draft_cache = new_cache(
            draft,
            batch_size=len(unread),
            capacity=capacity_for(draft.config, self._most_tokens(requests)),
        )
        draft_cache = read_rows(draft, draft_cache, unread)
        return (
            _make_rewindable(cache, self._model.config, count),
            _make_rewindable(draft_cache, draft.config, count),
        )

    def _most_tokens(self, requests: list[Request]) -> int:
        """That a cache of these requests will ever hold."""
        most = max(request.num_tokens + request.max_new_tokens for request in requests)
        return most + self._settings.num_draft_tokens

    def _starting_cache(self, requests: list[Request]) -> Cache:
        """A cache of its own for each request: empty, or its prefix's."""
        config = self._model.config
        most = self._most_tokens(requests)
        prefixes = [request.prefix for request in requests]
        if not any(prefixes):
            return new_cache(
                self._model,
                batch_size=len(requests),
                capacity=capacity_for(config, most),
            )
        caches = [
            self._starting_cache([request])
            if request.prefix is None
            else make_room(request.prefix.cache, config, most)
            for request in requests
        ]
        if all(prefix is prefixes[0] for prefix in prefixes) and len(prefixes) > 1:
            return cache_lib.repeat(caches[0], len(caches))
        if len(caches) > 1:
            return cache_lib.concatenate(caches)
        return jax.tree.map(jnp.copy, caches[0])


def _capacity(cache: Cache) -> int:
    """Slots of global attention; 0 without it."""
    return cache.capacity or 0
