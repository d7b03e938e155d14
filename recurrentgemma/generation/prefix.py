"""A text already read, to save, load, fork and continue: a cache and a history.

The prefix of a Griffin model has one size, however long the text was; with global
attention it grows with the text.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache, named_leaves
from recurrentgemma.generation import prefix_file
from recurrentgemma.generation.history import History
from recurrentgemma.generation.model_digest import (
    digest_of_norms,
    is_of_edited_model,
    model_digest,
)
from recurrentgemma.generation.prefix_checks import check_cache, new_history
from recurrentgemma.griffin import Griffin


@dataclasses.dataclass(frozen=True, repr=False)
class Prefix:
    """What a model has read, row by row. Made by `Sampler.prefill` or `from_cache`.

    Example:
      >>> prefix = sampler.prefill(open("book.txt", encoding="utf-8"))
      >>> prefix.save("book.prefix")
      >>> prefix = Prefix.load("book.prefix", model)
      >>> answers = sampler(questions, prefix=prefix)

    Raises:
      ValueError: a field is of another type, or the numbers of rows differ.
    """

    cache: Cache
    """The state of the model after all tokens of each row but the last."""
    history: History
    """The last token of each row, which the cache has not seen; number and set of its
    tokens, the begin token included; NumPy arrays."""
    model_digest: str
    """`model_digest` of the model that read the text."""

    def __post_init__(self):
        check.instance("cache", self.cache, Cache, "a Cache")
        check.instance("history", self.history, History, "a History")
        check.string("model_digest", self.model_digest)
        rows, expected = len(self.history.num_tokens), self.cache.batch_size
        if rows != expected:
            check.refuse("history", f"the {expected} rows of the cache", rows)

    @classmethod
    def from_cache(
        cls,
        model: Griffin,
        cache: Cache,
        last_token: Any,
        *,
        num_tokens: Any = None,
        seen: Any = None,
    ) -> Self:
        """A prefix from a cache of the caller's making, such as a learned or edited one.

        Args:
          model: the model that the prefix belongs to.
          cache: of B rows, in the shapes and dtypes of `model.init_cache`, with finite
            values and the counters of a text that the model could have read.
          last_token: int [B] or one for all rows, the last token of the text, which the
            cache has not seen; it is read first when the text goes on.
          num_tokens: int [B], number of tokens of each row, the last one included;
            None is one more than the cache has seen of its document.
          seen: bool [B, V], which tokens the row holds, for repetition penalties; None
            is the last token alone.

        Raises:
          ValueError: an argument is none of these; the message names it.
        """
        check.instance("model", model, Griffin, "a Griffin model")
        check.instance("cache", cache, Cache, "a Cache")
        check_cache(cache, model)
        vocab_size = model.config.vocab_size
        history = new_history(cache, vocab_size, last_token, num_tokens, seen)
        return cls(cache, history, model_digest(model))

    def __repr__(self) -> str:
        tokens = ", ".join(map(str, self.num_tokens))
        size = f"{self.num_bytes / 1e6:.1f} MB"
        return f"Prefix(rows={self.batch_size}, tokens={tokens}, {size})"

    @property
    def num_tokens(self) -> np.ndarray:
        """Number of tokens of each row, int32 [B]."""
        return self.history.num_tokens

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.num_tokens)

    @property
    def num_bytes(self) -> int:
        """Size of the cache in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache))

    def take(self, rows: Sequence[int]) -> "Prefix":
        """The chosen rows, in their order; a row may be taken more than once.

        Raises:
          ValueError: a row does not exist.
        """
        cache = cache_lib.take(self.cache, rows)
        return self._map(lambda array: array[np.asarray(rows)], cache)

    def repeat(self, count: int) -> "Prefix":
        """Every row `count` times, copies of a row side by side.

        Raises:
          ValueError: count is less than 1.
        """
        cache = cache_lib.repeat(self.cache, count)
        return self._map(lambda array: np.repeat(array, count, axis=0), cache)

    def check_model(self, model_digest: str) -> None:
        """Raises ValueError unless the digest is that of the model that read this."""
        check.string("model_digest", model_digest)
        _check_digest("The prefix", self.model_digest, model_digest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file, whole or not at all; an existing one is replaced.

        Raises:
          ValueError: it cannot be written, and what was there is as it was; or an edited
            model made it.
        """
        if is_of_edited_model(self.model_digest):
            raise ValueError(
                "prefix: expected one of a model without edits, got one of an edited "
                "model, whose functions no file holds; keep it in memory, or read the "
                "text with the model that was edited"
            )
        path = check.path("path", path)
        arrays = {
            name: np.asarray(leaf) for name, leaf in named_leaves(self.cache).items()
        }
        arrays |= self.history._asdict()
        arrays["seen"] = np.packbits(self.history.seen, axis=1)
        prefix_file.write(path, arrays, self.model_digest, self.cache.capacity)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Griffin) -> Self:
        """Reads a file of `save`, for the model that read the text.

        Args:
          path: the file.
          model: the model; keys and values are cast to its compute dtype.

        Raises:
          ValueError: the file is missing, damaged, no prefix, of a newer format, or of
            another architecture or a fine-tuned sibling; the message says which.
        """
        path = check.path("path", path)
        check.instance("model", model, Griffin, "a Griffin model")
        stored = prefix_file.read(path)
        digest = model_digest(model)
        now = digest if stored.version >= 3 else digest_of_norms(model)
        _check_digest(str(path), stored.model_digest, now)
        stored = prefix_file.translate(stored, model.config)
        rows = stored.arrays.get("last_token", np.zeros(0)).size
        vocab_size = model.config.vocab_size
        cache = jax.eval_shape(
            lambda: model.init_cache(max(rows, 1), capacity=stored.capacity)
        )
        row = jax.ShapeDtypeStruct((rows,), np.int32)
        bits = jax.ShapeDtypeStruct((rows, math.ceil(vocab_size / 8)), np.uint8)
        expected = named_leaves(cache) | History(row, row, bits)._asdict()
        arrays = prefix_file.fitting(path, stored.arrays, expected, vocab_size)
        leaves = [jnp.asarray(arrays[name]) for name in named_leaves(cache)]
        seen = np.unpackbits(arrays["seen"], axis=1, count=vocab_size).astype(bool)
        return cls(
            cache=jax.tree.unflatten(jax.tree.structure(cache), leaves),
            history=History(arrays["last_token"], arrays["num_tokens"], seen),
            model_digest=digest,
        )

    def _map(self, function, cache: Cache) -> "Prefix":
        history = History(*map(function, self.history))
        return dataclasses.replace(self, cache=cache, history=history)


def concatenate(prefixes: Sequence[Prefix]) -> Prefix:
    """The rows of several prefixes of one model, in order.

    Raises:
      ValueError: there are none, or they are of different models or capacities.
    """
    expected = "a list of at least one Prefix"
    check.instance("prefixes", prefixes, Sequence, expected)
    if not prefixes:
        check.refuse("prefixes", expected, prefixes)
    for i, prefix in enumerate(prefixes):
        check.instance(f"prefixes[{i}]", prefix, Prefix, "a Prefix")
        prefix.check_model(prefixes[0].model_digest)
    return dataclasses.replace(
        prefixes[0],
        cache=cache_lib.concatenate([prefix.cache for prefix in prefixes]),
        history=History.concatenate([prefix.history for prefix in prefixes]),
    )


def _check_digest(what: str, made_by: str, now: str) -> None:
    if made_by == now:
        return
    (made_architecture, *made), (architecture, *mine) = (
        digest.split(":") for digest in (made_by, now)
    )
    reason = "another architecture"
    if made_architecture == architecture:
        reason = "other weights, such as a fine-tuned sibling"
        if made[:1] == mine[:1]:
            reason = "other edits"
    raise ValueError(
        f"{what} was made by a model of {reason}; load that one, or read the text again."
    )
