"""What is carried between calls of the model, and operations on its rows.

The cache is what a Griffin model remembers of everything that it has read: for a
recurrent layer the state of the RG-LRU and the last inputs of its convolution, for a
local attention layer a ring of the last W keys and values. Its shapes do not depend on
the length of the text. Global attention keeps a ring of `capacity` entries instead, and
local attention beside it one of min(W, capacity).

A layer's state is that of its temporal mixer, whose class does what the operations here
need (`recurrentgemma.blocks.mixer.Mixer`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma.config import GriffinConfig
from recurrentgemma.mixers import TEMPORAL_MIXERS

OVERFLOWN = 1 << 30
"""The `num_tokens` of a row of a bounded state that has lost tokens of its document."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Cache:
    """The state of a model after the tokens of each row; a pytree, batch axis first."""

    layers: tuple[Any, ...]
    """The state of each layer's temporal mixer."""
    next_position: jax.Array
    """Position of each row's next token in its document, int32 [B]; 0: an empty row."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.next_position.shape[0]

    @property
    def capacity(self) -> int | None:
        """Tokens of a document that the layers can hold; None if there is no bound."""
        bounds = [state.capacity for state in _bounded(self)]
        return min(bounds, default=None)

    def floating(self) -> dict[str, jax.Array]:
        """Its floating-point leaves by name, such as "layers.0.h": what has a gradient.

        Example:
          >>> def loss(values):
          ...     hidden, _ = model(tokens, cache=cache.with_floating(values))
          ...     return jnp.sum(hidden)
          >>> gradient = jax.grad(loss)(cache.floating())
        """
        leaves = named_leaves(self).items()
        return {name: leaf for name, leaf in leaves if _is_floating(leaf)}

    def with_floating(self, values: Mapping[str, jax.Array]) -> "Cache":
        """The cache with other values in its floating-point leaves.

        Args:
          values: arrays by the names of `floating`, in its shapes; they are cast to the
            dtypes of the leaves that they replace.

        Raises:
          ValueError: a name is missing or unknown, or a shape or dtype is another one.
        """
        old = self.floating()
        if unknown := sorted(old.keys() ^ values.keys()):
            raise ValueError(
                "values: expected the names of cache.floating(), got too many or too "
                f"few: {', '.join(unknown)}; change the values that floating() returns"
            )
        for name, leaf in old.items():
            value = values[name]
            if getattr(value, "shape", None) != leaf.shape or not _is_floating(value):
                shape = list(leaf.shape)
                check.refuse(f"values[{name!r}]", f"floating point {shape}", value)
        leaves = [
            values[name].astype(leaf.dtype) if name in old else leaf
            for name, leaf in named_leaves(self).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(self), leaves)

    def __repr__(self) -> str:
        leaves = [leaf for leaf in jax.tree.leaves(self) if hasattr(leaf, "dtype")]
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        rows = getattr(self.next_position, "shape", "?")[0]
        return f"Cache(rows={rows}, layers={len(self.layers)}, {size / 1e6:.1f} MB)"


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their path, such as "layers.0.h", in the order of
    `jax.tree.leaves`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def take(cache: Cache, rows: Sequence[int] | jax.Array) -> Cache:
    """The cache of the chosen rows, in their order.

    Args:
      cache: any cache.
      rows: int [R], row indices, at least one; a row may be taken more than once.

    Returns:
      A cache of R rows.

    Raises:
      ValueError: a row does not exist. (Traced indices are not checked.)
    """
    _check_cache("cache", cache)
    traced = isinstance(rows, jax.core.Tracer)
    known = rows if traced else check.indices("rows", rows, cache.batch_size)
    index = jnp.asarray(known, jnp.int32)
    return jax.tree.map(lambda leaf: leaf[index], cache)


def repeat(cache: Cache, count: int) -> Cache:
    """Every row `count` times, copies of a row side by side.

    Raises:
      ValueError: count is less than 1.
    """
    _check_cache("cache", cache)
    count = check.positive_integer("count", count)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), cache)


def concatenate(caches: Sequence[Cache]) -> Cache:
    """The rows of several caches of one model, in order.

    Raises:
      ValueError: no caches were given, or their structure or row shapes differ.
    """
    expected = "a list of at least one Cache"
    check.instance("caches", caches, Sequence, expected)
    if not caches:
        check.refuse("caches", expected, caches)
    for i, cache in enumerate(caches):
        _check_cache(f"caches[{i}]", cache)
        if _row_shapes(cache) != _row_shapes(caches[0]):
            raise ValueError(
                f"caches[{i}]: expected one that fits caches[0], got one of another "
                "model, compute dtype or capacity; join those of one model alone"
            )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *caches)


def _check_cache(name: str, cache: Any) -> None:
    check.instance(name, cache, Cache, "a Cache, as a call of the model returns it")


def _check_config(config: Any) -> None:
    check.instance("config", config, GriffinConfig, "the GriffinConfig of the model")


def _row_shapes(cache: Cache):
    leaves, structure = jax.tree.flatten(cache)
    return structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]


def grow(cache: Cache, config: GriffinConfig, capacity: int) -> Cache:
    """The cache with room for `capacity` tokens.

    Args:
      cache: any cache.
      config: of its model.
      capacity: new number of slots of global attention. A model without it needs none;
        its cache comes back as it is.

    Raises:
      ValueError: a row holds more tokens, or has lost some. (Traced rows are not
        checked; one that has lost tokens stays marked.)
    """
    _check_cache("cache", cache)
    _check_config(config)
    capacity = check.positive_integer("capacity", capacity)
    before = cache.capacity
    if before is None:
        return cache
    held = max_tokens_held(cache)
    if held is not None and held >= OVERFLOWN:
        refuse_overflown(cache)
    if capacity < (held or 1):
        raise ValueError(
            f"capacity: expected at least {held or 1}, the tokens that a row holds, got "
            f"{capacity}"
        )
    return _map_layers(
        cache, config, lambda m, state: m.grow(config, state, before, capacity)
    )


def make_rewindable(cache: Cache, config: GriffinConfig, count: int) -> Cache:
    """The same cache, which also keeps what `rewind` needs to go back `count` tokens.

    The model takes and returns it like any other. 0 makes it a plain cache again.

    Args:
      cache: a cache, rewindable or not.
      config: of its model.
      count: K, most tokens to take back.

    Raises:
      ValueError: tokens cannot be taken back from a block type of the model.
    """
    _check_cache("cache", cache)
    _check_config(config)
    count = check.integer("count", count, least=0, most=check.MAX_COUNT)
    capacity = cache.capacity
    return _map_layers(
        cache,
        config,
        lambda m, state: m.make_rewindable(config, state, count, capacity),
    )


def rewind(cache: Cache, config: GriffinConfig, counts: jax.Array) -> Cache:
    """The cache before the last `counts` tokens of each row.

    Args:
      cache: from `make_rewindable`, or what the model made of it.
      config: of its model.
      counts: int32 [B], each at most K, of tokens read since and of one document.

    Raises:
      ValueError: an argument is none of these. (Values of counts are not checked.)
    """
    _check_cache("cache", cache)
    _check_config(config)
    shape = (cache.batch_size,)
    if getattr(counts, "shape", None) != shape or not jnp.issubdtype(
        counts.dtype, jnp.integer
    ):
        check.refuse("counts", f"an array of integers {list(shape)}", counts)
    position = cache.next_position - counts
    rewound = _map_layers(
        cache, config, lambda m, state: m.rewind(config, state, counts, position)
    )
    return dataclasses.replace(rewound, next_position=position)


def _map_layers(cache, config, change) -> Cache:
    """The cache with `change(mixer class, state)` for the state of each layer."""
    layers = tuple(
        change(TEMPORAL_MIXERS[kind], state)
        for kind, state in zip(config.block_types, cache.layers, strict=True)
    )
    return dataclasses.replace(cache, layers=layers)


def grows(config: GriffinConfig) -> bool:
    """Whether the cache of this model must grow with the text."""
    return any(TEMPORAL_MIXERS[kind].needs_capacity for kind in set(config.block_types))


def _bounded(cache: Cache) -> list[Any]:
    """The states that hold a bounded number of tokens; see `Mixer.needs_capacity`."""
    return [state for state in cache.layers if hasattr(state, "capacity")]


def max_tokens_held(cache: Cache) -> int | None:
    """Most tokens that a row holds in a bounded layer, `OVERFLOWN` if one has lost some.

    None if there is no such layer, or if the cache is traced.
    """
    bounded = _bounded(cache)
    if not bounded or isinstance(cache.next_position, jax.core.Tracer):
        return None
    return int(np.max(np.asarray(bounded[0].num_tokens)))


def refuse_overflown(cache: Cache) -> NoReturn:
    """Raises ValueError for a cache of which a row has lost tokens."""
    row = int(np.argmax(np.asarray(_bounded(cache)[0].num_tokens)))
    raise ValueError(
        f"cache: expected rows that hold their whole document, got row {row}, which "
        f"read more than the {cache.capacity} tokens that it has room for; read the "
        "text again with a larger capacity= of init_cache, or grow the cache in time"
    )


def tokens_held(cache: Cache | None, chunk_positions: jax.Array) -> jax.Array:
    """Number of tokens of its document that a bounded layer holds after each token.

    Args:
      cache: what the rows have read before; None is nothing.
      chunk_positions: int32 [B, T], padding at row ends.

    Returns:
      int32 [B, T]; 0 at padding, more than `OVERFLOWN` if tokens were lost before.
    """
    length = chunk_positions.shape[1]
    count = jnp.arange(1, length + 1, dtype=jnp.int32)[None]
    if cache is not None:
        # Layers that are bounded hold the same tokens.
        count = count + _bounded(cache)[0].num_tokens[:, None]
    restarted = jnp.cumsum(chunk_positions == 0, axis=1) > 0
    count = jnp.where(restarted, chunk_positions + 1, count)
    return jnp.where(chunk_positions >= 0, count, 0)
