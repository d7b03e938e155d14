"""The Griffin model: tokens and a cache in, hidden states and a cache out.

    hidden, cache = model(tokens, positions, cache)
    logits = model.logits(hidden)

One call serves training, prefill, chunked prefill, continuation and decode: a chunk of
any length from any cache, and any split of a sequence gives the same numbers.

Padding may stand anywhere in a row. It is moved to the end of its row once, at entry,
so that every layer works on rows that are padded at their end alone, where causality
already hides it; the hidden states are put back at the exit.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma import _validation as check
from recurrentgemma import cache as cache_lib
from recurrentgemma._compat import ModuleList
from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.blocks.residual import ResidualBlock
from recurrentgemma.cache import Cache
from recurrentgemma.chunk import Chunk, Observer, reorder
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.inputs import is_traced, kind_of, prepare
from recurrentgemma.kernels import meshes
from recurrentgemma.layers import Embedder, RMSNorm, soft_cap
from recurrentgemma.rotary import rotary_tables


class Griffin(nnx.Module):
    """A model of the Griffin family (arXiv 2402.19427, section 2).

    Outside a JAX transformation a call is a compiled call: it takes about as long as a
    jitted one, and compiles once for each shape.

    Example:
      >>> model = Griffin(PRESETS["nano"], rngs=nnx.Rngs(0))
      >>> hidden, cache = model(jnp.array([[2, 17, 23]]))
      >>> next_token = model.logits(hidden)[:, -1].argmax(-1)
      >>> hidden, cache = model(next_token[:, None], cache=cache)
    """

    observer: Observer | None = None
    """Who sees or replaces values inside the layers; see `recurrentgemma.inspect`."""

    def __init__(
        self, config: GriffinConfig, *, rngs: nnx.Rngs, runtime: Runtime = Runtime()
    ):
        """Random float32 parameters; layers in `blocks`, none stacked in `groups`.

        Raises:
          ValueError: an argument is of another class, or sizes of the config do not fit
            each other.
        """
        check.instance("config", config, GriffinConfig, "a GriffinConfig")
        check.instance("rngs", rngs, nnx.Rngs, "nnx.Rngs, such as nnx.Rngs(0)")
        check.instance("runtime", runtime, Runtime, "a Runtime")
        self.config = config
        self.runtime = runtime
        self.embedder = Embedder(
            config.vocab_size, config.width, config.embedding_scale, rngs=rngs
        )
        self.groups = ModuleList([])
        self.blocks = ModuleList(
            [
                ResidualBlock(config, runtime, block_type, rngs=rngs)
                for block_type in config.block_types
            ]
        )
        self.final_norm = RMSNorm(config.width)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Reads a chunk of tokens.

        Args:
          tokens: int32 [B, T], T >= 1.
          positions: int32 [B, T], the position of each token in its document: 0 starts
            a document, -1 is padding, else the previous position + 1 (a row that has
            read nothing may start anywhere). None continues each row. Values are not
            checked here; `recurrentgemma.chunk.check_positions` does.
          cache: what the rows have read before; None is nothing. Global attention holds
            `capacity` tokens of a document (T after a call without a cache). A call
            with concrete arrays first grows a cache that is too small. In a traced
            call, whose shapes are fixed, the hidden states of the tokens past the
            capacity are NaN, and so is all that the row reads until its next document:
            make room in time with `recurrentgemma.cache.grow`.

        Returns:
          hidden: [B, T, D] in the compute dtype, after the final norm; finite and
            otherwise unspecified at padding.
          cache: the state of the rows after the chunk.

        Raises:
          ValueError: shapes or dtypes do not fit each other, the cache belongs to
            another model or to a row that has lost tokens, or a concrete token is not
            in the vocabulary.
        """
        cache = prepare(self.config, tokens, positions, cache)
        if is_traced(self, tokens, positions, cache):
            return self._read(tokens, positions, cache)
        return _compiled_read(self, tokens, positions, cache)

    def _read(self, tokens, positions, cache):
        """The call itself, of arguments that were checked, under any mesh."""
        specs = functools.partial(meshes.rows_spec, tokens)
        return meshes.with_auto_axes(
            Griffin._run, specs, self, tokens, positions, cache
        )

    def _run(self, tokens, positions, cache):
        with jax.default_matmul_precision(self.runtime.matmul_precision):
            tokens, chunk = self._chunk(tokens, positions, cache)
            x = self.embedder.encode(tokens, self.runtime.dtype)
            x = chunk.observe("embedding", meshes.constrain_lookup(x))
            states = [None] * self.config.num_layers if cache is None else cache.layers
            x, states = self._run_layers(x, chunk, list(states))
            x = self.final_norm(x)
            if cache is not None and (capacity := cache.capacity) is not None:
                lost = cache_lib.tokens_held(cache, chunk.positions) > capacity
                x = jnp.where(lost[..., None], jnp.asarray(jnp.nan, x.dtype), x)
            if chunk.order is not None:
                x = reorder(x, chunk.order[1])
            return x, Cache(tuple(states), chunk.next_position)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits after the soft cap.

        Args:
          hidden: [B, T, D] from a call of the model.

        Returns:
          float32 [B, T, V].

        Raises:
          ValueError: hidden has another shape, or is not floating point.
        """
        width = self.config.width
        if (
            not hasattr(hidden, "shape")
            or hidden.ndim != 3
            or hidden.shape[2] != width
            or not jnp.issubdtype(hidden.dtype, jnp.floating)
        ):
            raise ValueError(
                f"hidden: expected floating-point hidden states [B, T, {width}], got "
                f"{kind_of(hidden)}; pass what a call of the model returns"
            )
        if is_traced(self.embedder, hidden):
            return self._logits(hidden)
        return _compiled_logits(self, hidden)

    def _logits(self, hidden):
        specs = functools.partial(meshes.rows_spec, hidden)
        return meshes.with_auto_axes(
            Griffin._run_logits, lambda: specs()[0], self, hidden
        )

    def _run_logits(self, hidden):
        with (
            jax.named_scope("logits"),
            jax.default_matmul_precision(self.runtime.matmul_precision),
        ):
            return soft_cap(self.embedder.decode(hidden), self.config.logits_soft_cap)

    def init_cache(self, batch_size: int, *, capacity: int | None = None) -> Cache:
        """A cache of rows that have read nothing.

        Args:
          batch_size: B, number of rows.
          capacity: tokens of a document that a model with global attention can hold;
            other models do not use it.

        Returns:
          A cache whose shapes never change under `jax.jit`.

        Raises:
          ValueError: batch_size is less than 1, or the model has global attention and
            capacity is missing or less than 1.
        """
        check.positive_integer("batch_size", batch_size)
        if capacity is not None:
            check.positive_integer("capacity", capacity)
        elif cache_lib.grows(self.config):
            raise ValueError(
                "capacity: expected the tokens that global attention can hold, got "
                "None; pass capacity= to init_cache"
            )
        if is_traced(self):
            return self._init_cache(batch_size, capacity)
        return _compiled_init_cache(self, batch_size, capacity)

    def _init_cache(self, batch_size, capacity):
        states = [
            self._layer(i).mixer.init_state(batch_size, capacity)
            for i in range(self.config.num_layers)
        ]
        return Cache(tuple(states), jnp.zeros((batch_size,), jnp.int32))

    def _layer(self, index: int) -> ResidualBlock:
        """The module of a layer; of a stacked one, the module of its group."""
        period = len(self.groups)
        stacked = self.config.num_layers - len(self.blocks)
        if index < stacked:
            return self.groups[index % period]
        return self.blocks[index - stacked]

    def _chunk(self, tokens, positions, cache) -> tuple[jax.Array, Chunk]:
        """Tokens with padding at row ends, and their `Chunk`."""
        batch_size, length = tokens.shape
        if cache is None:
            start = jnp.zeros((batch_size,), jnp.int32)
        else:
            start = cache.next_position
        order = None
        if positions is None:
            positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
            lengths = jnp.full((batch_size,), length, jnp.int32)
            next_position = start + length
        else:
            positions = jnp.maximum(positions.astype(jnp.int32), -1)
            if length > 1:
                given = jnp.argsort(positions < 0, axis=1, stable=True)
                order = given, jnp.argsort(given, axis=1)
                tokens = reorder(tokens, given)
                positions = reorder(positions, given)
            lengths = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
            last = jnp.maximum(lengths - 1, 0)[:, None]
            last_position = jnp.take_along_axis(positions, last, axis=1)[:, 0]
            next_position = jnp.where(lengths > 0, last_position + 1, start)
        rotary = None
        if any(TEMPORAL_MIXERS[kind].uses_rotary for kind in self.config.block_types):
            rotated_dim = round(self.config.rope_fraction * self.config.head_dim)
            rotary = rotary_tables(positions, rotated_dim)
        chunk = Chunk(
            positions, lengths, next_position, rotary, order, observer=self.observer
        )
        return tokens, chunk

    def _run_layers(self, x, chunk, states):
        """Stacked groups under one scan, then the layers that are not stacked."""

        def run(blocks, x, states, chunk):
            new_states = []
            for block, state in zip(blocks, states, strict=True):
                x, state = block(x, chunk, state)
                x = meshes.constrain("btd", x)
                new_states.append(state)
            return x, new_states

        if self.runtime.remat:
            run = jax.checkpoint(run)
        stacked = self.config.num_layers - len(self.blocks)
        period = len(self.groups)
        narrow = operator.methodcaller("with_narrow_matrices", self.runtime.dtype)
        groups, blocks = (list(map(narrow, m)) for m in (self.groups, self.blocks))
        new_states = [None] * stacked
        if stacked:
            if self.observer is not None:
                raise ValueError(
                    "model: expected layers that are not stacked, because each has its "
                    "own name for the observer; use unstack_layers"
                )
            by_place = [_stack(states[p:stacked:period]) for p in range(period)]
            x, by_place = jax.lax.scan(
                lambda x, group: run(group[0], x, group[1], chunk),
                x,
                (groups, by_place),
            )
            for p, place in enumerate(by_place):
                new_states[p::period] = _unstack(place, stacked // period)
        layers = zip(blocks, states[stacked:], strict=True)
        for index, (block, state) in enumerate(layers, stacked):
            layer_chunk = chunk.within(f"blocks.{index}")
            x, [state] = run([block], x, [state], layer_chunk)
            new_states.append(state)
        return x, new_states

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self)
        dtypes = sorted({str(getattr(leaf, "dtype", "?")) for leaf in leaves})
        count = sum(getattr(leaf, "size", 0) for leaf in leaves)
        return (
            f"Griffin(layers={self.config.num_layers}, width={self.config.width}, "
            f"{count:,} parameters in {' and '.join(dtypes)})"
        )

    __str__ = __repr__


def stack_layers(model: Griffin) -> Griffin:
    """The same model with whole pattern groups stacked, to be run by one `lax.scan`.

    Compile time then does not grow with depth, and with `Runtime(remat=True)` the
    backward pass keeps one activation a group. For training: decode is faster unstacked,
    and checkpoints on disk are unstacked.

    Args:
      model: a model that is not stacked. It stays valid.

    Returns:
      A model with new, stacked parameters of the layers; the others are shared. Fewer
      layers than the pattern has stay as they are.

    Raises:
      ValueError: layers of one place of the pattern differ, such as in their adapters.
    """
    period = len(model.config.block_pattern)
    groups = model.config.num_layers // period
    blocks = list(model.blocks)
    for p in range(period):
        place = blocks[p : groups * period : period]
        if len({jax.tree.structure(block) for block in place}) > 1:
            raise ValueError(
                f"model: expected layers {p}, {p + period}, ... to be alike, got "
                "different ones; put adapters on the same matrices of all of them"
            )
    stacked = jax.tree.map(lambda leaf: leaf, model)
    if not groups:
        return stacked
    stacked.groups = ModuleList(
        [_stack(blocks[p : groups * period : period]) for p in range(period)]
    )
    stacked.blocks = ModuleList(blocks[groups * period :])
    return stacked


def unstack_layers(model: Griffin) -> Griffin:
    """The inverse of `stack_layers`."""
    unstacked = jax.tree.map(lambda leaf: leaf, model)
    period = len(model.groups)
    if period:
        groups = model.config.num_layers // period
        places = [_unstack(place, groups) for place in model.groups]
        layers = [block for group in zip(*places, strict=True) for block in group]
        unstacked.blocks = ModuleList([*layers, *model.blocks])
        unstacked.groups = ModuleList([])
    return unstacked


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unstack(tree: Any, count: int) -> list[Any]:
    leaves, structure = jax.tree.flatten(tree)
    return [
        jax.tree.unflatten(structure, [leaf[i] for leaf in leaves])
        for i in range(count)
    ]


@jax.jit
def _compiled_read(model, tokens, positions, cache):
    return model._read(tokens, positions, cache)


@jax.jit
def _compiled_logits(model, hidden):
    return model._logits(hidden)


@functools.partial(jax.jit, static_argnames=("batch_size", "capacity"))
def _compiled_init_cache(model, batch_size, capacity):
    return model._init_cache(batch_size, capacity)
