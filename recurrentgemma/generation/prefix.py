"""A text already read, to save, load, fork and continue: a cache and a history.

The prefix of a Griffin model has one size, however long the text was; with global
attention it grows with the text.

A file is one safetensors file: the arrays by path, and as metadata the format's version,
the capacity of a cache that has one, and three digests: of the architecture, of weights
that every fine-tuning changes, and of the arrays. In version 1 the layers of a kind
shared the positions of their keys; such files are translated.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from recurrentgemma import cache as cache_lib
from recurrentgemma._atomic import replace_file
from recurrentgemma.cache import Cache
from recurrentgemma.config import GriffinConfig
from recurrentgemma.generation.history import History
from recurrentgemma.griffin import Griffin

FORMAT = "recurrentgemma-prefix"
VERSION = 2
_SHARED_POSITIONS = {
    "local_attention": "key_positions",
    "global_attention": "global_key_positions",
}
"""Names in version 1 of the positions that the layers of a kind shared."""

_DIGESTED = ("scale", "a_param")


@dataclasses.dataclass(frozen=True, repr=False)
class Prefix:
    """What a model has read, row by row. Made by `Sampler.prefill`.

    Example:
      >>> prefix = sampler.prefill(open("book.txt", encoding="utf-8"))
      >>> prefix.save("book.prefix")
      >>> prefix = Prefix.load("book.prefix", model)
      >>> answers = sampler(questions, prefix=prefix)
    """

    cache: Cache
    """The state of the model after all tokens of each row but the last."""
    history: History
    """The last token of each row, which the cache has not seen; number and set of its
    tokens, the begin token included; NumPy arrays."""
    model_digest: str
    """`model_digest` of the model that read the text."""

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
        _check_digest("The prefix", self.model_digest, model_digest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file, whole or not at all; an existing one is replaced.

        Raises:
          ValueError: it cannot be written; what was there is as it was.
        """
        arrays = {name: np.asarray(leaf) for name, leaf in _named(self.cache).items()}
        arrays |= self.history._asdict()
        arrays["seen"] = np.packbits(self.history.seen, axis=1)
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "model_digest": self.model_digest,
            "content_digest": _content_digest(arrays),
        }
        if self.cache.capacity is not None:
            metadata["capacity"] = str(self.cache.capacity)
        try:
            with replace_file(Path(path)) as partial:
                save_file(arrays, partial, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"Cannot write the prefix {path}: {error}. What was there is unchanged."
            ) from error

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
        metadata, arrays = _read(Path(path))
        _check_digest(str(path), metadata["model_digest"], model_digest(model))
        if _content_digest(arrays) != metadata["content_digest"]:
            raise ValueError(f"{path} is damaged: its arrays do not fit their digest.")
        if int(metadata["version"]) == 1:
            metadata, arrays = _translate_version_1(metadata, arrays, model.config)
        capacity = metadata.get("capacity")
        like = jax.eval_shape(
            lambda: model.init_cache(
                len(arrays["last_token"]),
                capacity=None if capacity is None else int(capacity),
            )
        )
        leaves = [
            jnp.asarray(arrays[name], leaf.dtype) for name, leaf in _named(like).items()
        ]
        vocab_size = model.config.vocab_size
        return cls(
            cache=jax.tree.unflatten(jax.tree.structure(like), leaves),
            history=History(
                arrays["last_token"],
                arrays["num_tokens"].astype(np.int32),
                np.unpackbits(arrays["seen"], axis=1, count=vocab_size).astype(bool),
            ),
            model_digest=metadata["model_digest"],
        )

    def _map(self, function, cache: Cache) -> "Prefix":
        history = History(*map(function, self.history))
        return dataclasses.replace(self, cache=cache, history=history)


def concatenate(prefixes: Sequence[Prefix]) -> Prefix:
    """The rows of several prefixes of one model, in order.

    Raises:
      ValueError: there are none, or they are of different models or capacities.
    """
    if not prefixes:
        raise ValueError("prefixes must hold at least one prefix.")
    for prefix in prefixes:
        prefix.check_model(prefixes[0].model_digest)
    return dataclasses.replace(
        prefixes[0],
        cache=cache_lib.concatenate([prefix.cache for prefix in prefixes]),
        history=History.concatenate([prefix.history for prefix in prefixes]),
    )


def model_digest(model: Griffin) -> str:
    """Architecture and weights as text: the config's fingerprint, and a digest of the
    norm scales and `a_param` rounded to bfloat16, which every fine-tuning changes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        # The last key is the variable's own.
        name = jax.tree_util.keystr(path[-2:-1], simple=True)
        if name in _DIGESTED:
            digest.update(np.asarray(leaf.astype(jnp.bfloat16)).tobytes())
    return f"{model.config.fingerprint()}:{digest.hexdigest()}"


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by path, in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a prefix that was saved here.")
            if int(metadata["version"]) > VERSION:
                raise ValueError(
                    f"{path} has version {metadata['version']} of the prefix format, "
                    f"which is newer than {VERSION}: read it with a newer package."
                )
            names = file.keys()
            return metadata, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise ValueError(f"There is no prefix {path}.") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is no prefix, or a damaged one: {error}. Read the text again."
        ) from error


def _translate_version_1(
    metadata: dict[str, str], arrays: dict[str, np.ndarray], config: GriffinConfig
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """What version 2 would have stored: positions for each ring, and the capacity."""
    shared = {name: arrays.get(name) for name in _SHARED_POSITIONS.values()}
    arrays = {name: array for name, array in arrays.items() if name not in shared}
    for layer, kind in enumerate(config.block_types):
        if kind in _SHARED_POSITIONS:
            positions = shared[_SHARED_POSITIONS[kind]]
            assert positions is not None, f"a prefix without positions of {kind}"
            arrays[f"layers.{layer}.positions"] = positions
    positions = shared[_SHARED_POSITIONS["global_attention"]]
    if positions is not None:
        metadata = {**metadata, "capacity": str(positions.shape[1])}
    return metadata, arrays


def _check_digest(what: str, made_by: str, now: str) -> None:
    if made_by == now:
        return
    reason = "another architecture"
    if made_by.split(":")[0] == now.split(":")[0]:
        reason = "other weights, such as a fine-tuned sibling"
    raise ValueError(
        f"{what} was made by a model of {reason}; load that one, or read the text again."
    )


def _content_digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
