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
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma._compat import ModuleList
from recurrentgemma.blocks.residual import ResidualBlock
from recurrentgemma.cache import AttentionState, Cache, Chunk
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.kernels import meshes
from recurrentgemma.kernels.local_attention import KVCache
from recurrentgemma.layers import Embedder, RMSNorm, soft_cap
from recurrentgemma.rotary import rotary_tables


class Griffin(nnx.Module):
    """A model of the Griffin family (arXiv 2402.19427, section 2).

    Example:
      >>> model = Griffin(PRESETS["nano"], rngs=nnx.Rngs(0))
      >>> hidden, cache = model(jnp.array([[2, 17, 23]]))
      >>> next_token = model.logits(hidden)[:, -1].argmax(-1)
      >>> hidden, cache = model(next_token[:, None], cache=cache)
    """

    def __init__(
        self, config: GriffinConfig, *, rngs: nnx.Rngs, runtime: Runtime = Runtime()
    ):
        """Random float32 parameters; layers in `blocks`, none stacked in `groups`."""
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
            checked here; `recurrentgemma.cache.check_positions` does.
          cache: what the rows have read before; None is nothing.

        Returns:
          hidden: [B, T, D] in the compute dtype, after the final norm; finite and
            otherwise unspecified at padding.
          cache: the state of the rows after the chunk.

        Raises:
          ValueError: shapes or dtypes do not fit each other.
        """
        _check_inputs(self.config, tokens, positions, cache)
        specs = functools.partial(meshes.rows_spec, tokens)
        return meshes.with_auto_axes(
            Griffin._call, specs, self, tokens, positions, cache
        )

    def _call(self, tokens, positions, cache):
        tokens, chunk, inverse = self._chunk(tokens, positions, cache)
        x = self.embedder.encode(tokens, self.runtime.dtype)
        states = _open_cache(self.config, cache)
        x, states = self._run_layers(x, chunk, states)
        x = self.final_norm(x)
        if inverse is not None:
            x = jnp.take_along_axis(x, inverse[..., None], axis=1)
        return x, _close_cache(self.config, states, chunk.next_position)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Next-token logits after the soft cap.

        Args:
          hidden: [B, T, D] from a call of the model.

        Returns:
          float32 [B, T, V].
        """
        specs = functools.partial(meshes.rows_spec, hidden)
        return meshes.with_auto_axes(Griffin._logits, lambda: specs()[0], self, hidden)

    def _logits(self, hidden):
        with jax.named_scope("logits"):
            return soft_cap(self.embedder.decode(hidden), self.config.logits_soft_cap)

    def init_cache(self, batch_size: int, *, capacity: int | None = None) -> Cache:
        """A cache of rows that have read nothing.

        Args:
          batch_size: B, number of rows.
          capacity: tokens of a document that global attention can hold; other block
            types do not use it.

        Returns:
          A cache whose shapes never change.

        Raises:
          ValueError: batch_size is less than 1, or the model has global attention and
            capacity is missing or less than 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        blocks = [self._layer(i).mixer for i in range(self.config.num_layers)]
        states = [block.init_state(batch_size, capacity) for block in blocks]
        empty = jnp.zeros((batch_size,), jnp.int32)
        return _close_cache(self.config, states, empty)

    def _layer(self, index: int) -> ResidualBlock:
        """The module of a layer; of a stacked one, the module of its group."""
        period = len(self.groups)
        stacked = self.config.num_layers - len(self.blocks)
        if index < stacked:
            return self.groups[index % period]
        return self.blocks[index - stacked]

    def _chunk(self, tokens, positions, cache):
        """Tokens with padding at row ends, their `Chunk`, and the way back."""
        batch_size, length = tokens.shape
        if cache is None:
            start = jnp.zeros((batch_size,), jnp.int32)
        else:
            start = cache.next_position
        inverse = None
        if positions is None:
            positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
            lengths = jnp.full((batch_size,), length, jnp.int32)
            next_position = start + length
        else:
            positions = jnp.maximum(positions.astype(jnp.int32), -1)
            if length > 1:
                order = jnp.argsort(positions < 0, axis=1, stable=True)
                inverse = jnp.argsort(order, axis=1)
                tokens = jnp.take_along_axis(tokens, order, axis=1)
                positions = jnp.take_along_axis(positions, order, axis=1)
            lengths = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
            last = jnp.maximum(lengths - 1, 0)[:, None]
            last_position = jnp.take_along_axis(positions, last, axis=1)[:, 0]
            next_position = jnp.where(lengths > 0, last_position + 1, start)
        rotary = None
        if any(kind.endswith("attention") for kind in self.config.block_types):
            rotated_dim = round(self.config.rope_fraction * self.config.head_dim)
            rotary = rotary_tables(positions, rotated_dim)
        return tokens, Chunk(positions, lengths, next_position, rotary), inverse

    def _run_layers(self, x, chunk, states):
        """Stacked groups under one scan, then the layers that are not stacked."""

        def run(blocks, x, states):
            new_states = []
            for block, state in zip(blocks, states, strict=True):
                x, state = block(x, chunk, state)
                new_states.append(state)
            return x, new_states

        if self.runtime.remat:
            run = jax.checkpoint(run)
        stacked = self.config.num_layers - len(self.blocks)
        period = len(self.groups)
        new_states = [None] * stacked
        if stacked:
            by_place = [_stack(states[p:stacked:period]) for p in range(period)]
            x, by_place = jax.lax.scan(
                lambda x, group: run(group[0], x, group[1]),
                x,
                (list(self.groups), by_place),
            )
            for p, place in enumerate(by_place):
                new_states[p::period] = _unstack(place, stacked // period)
        for block, state in zip(self.blocks, states[stacked:], strict=True):
            x, [state] = run([block], x, [state])
            new_states.append(state)
        return x, new_states


def stack_layers(model: Griffin) -> Griffin:
    """The same model with whole pattern groups stacked, to be run by one `lax.scan`.

    Compile time then does not grow with depth, and with `Runtime(remat=True)` the
    backward pass keeps one activation a group. For training: decode is faster unstacked,
    and checkpoints on disk are unstacked.

    Args:
      model: a model that is not stacked. It stays valid.

    Returns:
      A model with new, stacked parameters of the layers; the others are shared.
    """
    period = len(model.config.block_pattern)
    groups = model.config.num_layers // period
    blocks = list(model.blocks)
    stacked = jax.tree.map(lambda leaf: leaf, model)
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


def _open_cache(config: GriffinConfig, cache: Cache | None) -> list[Any]:
    """The state of each layer as its mixer takes it."""
    if cache is None:
        return [None] * config.num_layers
    positions: dict[str, Any] = {
        "local_attention": cache.key_positions,
        "global_attention": cache.global_key_positions,
    }
    return [
        KVCache(*state, positions[kind]) if isinstance(state, AttentionState) else state
        for kind, state in zip(config.block_types, cache.layers, strict=True)
    ]


def _close_cache(
    config: GriffinConfig, states: list[Any], next_position: jax.Array
) -> Cache:
    """The cache of these states; layers of a kind share the positions of their keys."""
    positions: dict[str, Any] = dict.fromkeys(("local_attention", "global_attention"))
    layers = []
    for kind, state in zip(config.block_types, states, strict=True):
        if isinstance(state, KVCache):
            positions[kind] = state.positions
            state = AttentionState(state.keys, state.values)
        layers.append(state)
    return Cache(
        layers=tuple(layers),
        next_position=next_position,
        key_positions=positions["local_attention"],
        global_key_positions=positions["global_attention"],
    )


def _check_inputs(config, tokens, positions, cache):
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"tokens must be [B, T] with B and T at least 1, got {tokens.shape}."
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}.")
    if positions is not None and positions.shape != tokens.shape:
        raise ValueError(
            f"positions must have the shape of tokens, {tokens.shape}, got "
            f"{positions.shape}."
        )
    if positions is not None and not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions must be integers, got {positions.dtype}.")
    if cache is not None and cache.batch_size != tokens.shape[0]:
        raise ValueError(
            f"tokens have {tokens.shape[0]} rows but the cache has "
            f"{cache.batch_size}; use take, repeat or concatenate on the cache."
        )
    if cache is not None and len(cache.layers) != config.num_layers:
        raise ValueError(
            f"The cache has {len(cache.layers)} layers but the model has "
            f"{config.num_layers}; it belongs to another model."
        )
