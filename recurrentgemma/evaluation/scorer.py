"""Requests of an evaluation to a model: log-likelihoods and greedy texts.

What requests have in common at their beginning is read once and forked (see
`shared_prefixes`). Rows are padded at their end into chunks of three sizes, and a batch
is filled up to `batch_size` rows (a beginning that is alone is read as one row): no new
length, and no odd number of requests, compiles anything. Answers depend neither on the
other requests of a batch nor on their order, but for rounding. Requests with the same
tokens are one.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.evaluation.answer_cache import AnswerCache, digest_of
from recurrentgemma.evaluation.shared_prefixes import Node, shared_prefixes
from recurrentgemma.generation.chunk_reader import ChunkReader
from recurrentgemma.generation.model_digest import ModelDigest
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
# Batches of texts between two savings of what is finished.
_BATCHES_A_CALL = 4

_take = jax.jit(cache_lib.take)


class Continuation(NamedTuple):
    """A request for a log-likelihood.

    Attributes:
      context: Token ids before the continuation, at least one.
      tokens: Token ids of the continuation.
    """

    context: list[int]
    tokens: list[int]


class LogLikelihood(NamedTuple):
    """How probable a continuation is.

    Attributes:
      log_prob: Sum of the log-probabilities of its tokens, in nats.
      is_greedy: Whether each of its tokens is the most probable one.
    """

    log_prob: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class Text:
    """A request for a text."""

    context: list[int]
    """Token ids to continue, at least one."""
    max_new_tokens: int = 256
    """Most tokens of the text."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; not part of it."""
    sampling: Sampling = GREEDY
    """How tokens are chosen."""


class Scorer:
    """Answers the requests of evaluations with one model.

    Example:
      >>> scorer = Scorer(Sampler(*load("nano")))
      >>> answers = dict(scorer.log_likelihoods([Continuation([2, 17], [30, 31])]))
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        batch_size: int = 8,
        cache: AnswerCache | None = None,
        share: bool = True,
    ):
        """Computes nothing yet.

        Args:
          sampler: of the model, with a tokenizer.
          batch_size: rows at a time; changes no answer.
          cache: answers that are known already, and where new ones go.
          share: whether shared beginnings are read once. False reads each request from
            its first token, to measure what sharing saves.

        Raises:
          ValueError: the sampler has no tokenizer, or batch_size is less than 1.
        """
        check.instance("sampler", sampler, Sampler, "a Sampler")
        if sampler.tokenizer is None:
            raise ValueError("sampler: expected one with a tokenizer, got none")
        self.sampler = sampler
        self.tokenizer: Tokenizer = sampler.tokenizer
        self.batch_size = check.positive_integer("batch_size", batch_size)
        self.cache = AnswerCache() if cache is None else cache
        self.tokens_read = 0
        """Number of tokens that the model has read so far, without padding."""
        self._share = check.boolean("share", share)
        self._reader = ChunkReader(sampler.model)
        self._digest = ModelDigest(sampler.model)
        self.tokenizer_digest = hashlib.sha256(self.tokenizer.model_bytes).hexdigest()
        """SHA-256 of the tokenizer's model."""

    def log_likelihoods(
        self, requests: Sequence[Continuation]
    ) -> Iterator[tuple[int, LogLikelihood]]:
        """The log-likelihood of each continuation after its context.

        Args:
          requests: contexts and continuations; an empty continuation has 0.

        Yields:
          The index of a request and its answer, as they are found; known ones first.

        Raises:
          ValueError: a context is empty, or a token is not in the vocabulary.
        """
        requests = [self._checked(i, request) for i, request in enumerate(requests)]
        keys = [self._key("log-likelihood", *request) for request in requests]
        alike = _places(keys)
        waiting = []
        for key, places in alike.items():
            if key in self.cache:
                yield from ((i, LogLikelihood(*self.cache[key])) for i in places)
            elif not requests[places[0]].tokens:
                yield from ((i, LogLikelihood(0.0, True)) for i in places)
            else:
                waiting.append(places[0])
        rows = [[*requests[i].context, *requests[i].tokens] for i in waiting]
        # The last token of a context is read with the continuation.
        limits = [len(requests[i].context) - 1 for i in waiting]
        for batch in self._scored(rows, limits):
            answers = {}
            for row, scores in batch.items():
                count = len(requests[waiting[row]].tokens)
                total = np.sum(scores.log_probs[-count:], dtype=np.float64)
                is_greedy = bool(np.all(scores.is_best[-count:]))
                answers[waiting[row]] = LogLikelihood(float(total), is_greedy)
            self.cache.add([(keys[i], list(answer)) for i, answer in answers.items()])
            for i, answer in answers.items():
                yield from ((place, answer) for place in alike[keys[i]])

    def texts(self, requests: Sequence[Text]) -> Iterator[tuple[int, str]]:
        """The text that continues each context.

        Args:
          requests: contexts, and how they are continued. The seed of a text that is
            drawn follows from its tokens and from how many like it come before.

        Yields:
          The index of a request and its text, as they are found; known ones first.

        Raises:
          ValueError: a context is empty, or a token is not in the vocabulary.
        """
        keys, counts = [], {}
        for i, request in enumerate(requests):
            self._check_tokens(f"requests[{i}]", request.context)
            fields = dataclasses.asdict(request)
            same = json.dumps(fields)
            # A greedy text is the same each time, a drawn one another each time.
            drawn = request.sampling.temperature > 0
            counts[same] = counts.get(same, -1) + 1
            keys.append(self._key("text", fields, counts[same] if drawn else 0))
        alike = _places(keys)
        groups: dict[tuple, list[int]] = {}
        for key, places in alike.items():
            if key in self.cache:
                yield from ((i, self.cache[key]) for i in places)
            else:
                request = requests[places[0]]
                group = (request.stop, request.sampling)
                groups.setdefault(group, []).append(places[0])
        for (stop, sampling), members in groups.items():
            some = [requests[i] for i in members]
            for batch in self._continued(some, stop, sampling, members, keys):
                texts = {members[row]: text for row, text in batch.items()}
                self.cache.add([(keys[i], text) for i, text in texts.items()])
                for i, text in texts.items():
                    yield from ((place, text) for place in alike[keys[i]])

    def _scored(
        self, rows: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> Iterator[dict[int, Any]]:
        """Scores of rows, batch by batch: index to scores of all that was read alone."""
        if rows:
            tree = self._tree(rows, limits)
            yield from self._visit(self._reader.new_cache(1, 1), [tree], rows)

    def _visit(
        self, cache: Cache, nodes: list[Node], rows: Sequence[Sequence[int]]
    ) -> Iterator[dict[int, Any]]:
        """The rows below nodes; row k of the cache has read what node k shares."""
        leaves = [
            (place, row, node.stop)
            for place, node in enumerate(nodes)
            for row in node.rows
        ]
        # Rows of like lengths together, so that little is padded.
        leaves.sort(key=lambda leaf: leaf[2] - len(rows[leaf[1]]))
        for batch in self._batches(leaves):
            unread = [rows[row][start:] for _, row, start in batch]
            room = max(len(rows[row]) for _, row, _ in batch)
            places = [place for place, _, _ in batch]
            forks = self._forks(cache, places, room, self.batch_size)
            self.tokens_read += sum(len(row) - 1 for row in unread)
            padding = [[0]] * (self.batch_size - len(batch))
            scores, _ = self._reader.score(forks, [*unread, *padding])
            yield {
                row: found for (_, row, _), found in zip(batch, scores, strict=False)
            }
        below = [
            (place, child)
            for place, node in enumerate(nodes)
            for child in node.children
        ]
        below.sort(key=lambda pair: pair[1].start - pair[1].stop)
        for batch in self._batches(below):
            children = [child for _, child in batch]
            segments = [
                rows[child.any_row()][child.start : child.stop] for child in children
            ]
            room = max(child.stop for child in children)
            # The examples of a task, mostly one node, are read without padding rows.
            size = 1 if len(batch) == 1 else self.batch_size
            forks = self._forks(cache, [place for place, _ in batch], room, size)
            self.tokens_read += sum(map(len, segments))
            padding = [[]] * (size - len(batch))
            read = self._reader.read(forks, [*segments, *padding])
            yield from self._visit(read, children, rows)

    def _forks(self, cache: Cache, places: list[int], room: int, size: int) -> Cache:
        """Copies of rows of a cache, `size` with those that pad, with room for tokens."""
        padding = [0] * (size - len(places))
        index = np.array([*places, *padding], np.int32)
        return self._reader.make_room(_take(cache, index), room)

    def _batches(self, items: list[Any]) -> Iterator[list[Any]]:
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]

    def _continued(
        self,
        requests: list[Text],
        stop: tuple[str, ...],
        sampling: Sampling,
        places: list[int],
        keys: list[str],
    ) -> Iterator[dict[int, str]]:
        """Texts of requests with the same settings, some at a time, by index."""
        rows = [request.context for request in requests]
        tree = self._tree(rows, [len(row) - 1 for row in rows])
        prefixes: dict[int, Prefix | None] = {id(tree): None}
        for node in tree.nodes():
            prefix = prefixes.pop(id(node))
            if node.stop > node.start:
                segment = rows[node.any_row()][node.start : node.stop]
                self.tokens_read += len(segment)
                prefix = self.sampler.prefill(segment, prefix=prefix)
            prefixes |= {id(child): prefix for child in node.children}
            step = _BATCHES_A_CALL * self.batch_size
            # Texts of like lengths together.
            order = sorted(node.rows, key=lambda i: -requests[i].max_new_tokens)
            for start in range(0, len(order), step):
                some = order[start : start + step]
                unread = [rows[i][node.stop :] for i in some]
                self.tokens_read += sum(map(len, unread))
                padding = max(0, self.batch_size - len(some))
                blank = [self.tokenizer.bos_id]
                samples = self.sampler(
                    [*unread, *[blank] * padding],
                    max_new_tokens=[requests[i].max_new_tokens for i in some]
                    + [1] * padding,
                    sampling=sampling,
                    seed=[zlib.crc32(keys[places[i]].encode()) for i in some]
                    + [0] * padding,
                    prefix=prefix,
                    stop=stop,
                    batch_size=self.batch_size,
                )
                yield {i: sample.text for i, sample in zip(some, samples, strict=False)}

    def _tree(self, rows: Sequence[Sequence[int]], limits: Sequence[int]) -> Node:
        if self._share:
            return shared_prefixes(rows, limits)
        return Node(0, 0, list(range(len(rows))), [])

    def _checked(self, i: int, request: Continuation) -> Continuation:
        self._check_tokens(f"requests[{i}].context", request.context)
        vocab_size = self.sampler.model.config.vocab_size
        check.token_ids(f"requests[{i}].tokens", request.tokens, vocab_size)
        return request

    def _check_tokens(self, name: str, tokens: Sequence[int]) -> None:
        vocab_size = self.sampler.model.config.vocab_size
        if not check.token_ids(name, tokens, vocab_size):
            raise ValueError(
                f"{name}: expected at least one token, got none; start from the begin "
                "token"
            )

    def _key(self, *parts: Any) -> str:
        return digest_of(self._digest(), self.tokenizer_digest, *parts)


def _places(keys: Sequence[str]) -> dict[str, list[int]]:
    """Indices of each key."""
    places: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return places
