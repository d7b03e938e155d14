"""What a call of the model is given: checks, and room for it in the cache.

Shapes and dtypes are checked in every call; values where they are concrete.
"""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from recurrentgemma import cache as cache_lib
from recurrentgemma._validation import refuse
from recurrentgemma.cache import Cache
from recurrentgemma.chunk import reorder
from recurrentgemma.config import GriffinConfig
from recurrentgemma.mixers import TEMPORAL_MIXERS


def is_traced(*trees: Any) -> bool:
    """Whether a leaf belongs to a JAX transformation, which then compiles the call."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def prepare(
    config: GriffinConfig,
    tokens: jax.Array,
    positions: jax.Array | None,
    cache: Cache | None,
) -> Cache | None:
    """Checks the arguments of a call; the cache, grown if it is concrete and too small.

    Raises:
      ValueError: as a call of the model.
    """
    _check_inputs(config, tokens, positions, cache)
    if cache is None or (capacity := cache.capacity) is None:
        return cache
    if is_traced(tokens, positions, cache):
        return cache
    held = int(_most_tokens_held(cache, positions, length=tokens.shape[1]))
    if held <= capacity:
        return cache
    if held > cache_lib.OVERFLOWN:
        cache_lib.refuse_overflown(cache)
    return _grow(cache, config, 1 << (held - 1).bit_length())


_grow = jax.jit(cache_lib.grow, static_argnums=(1, 2))


@functools.partial(jax.jit, static_argnames="length")
def _most_tokens_held(cache, positions, length):
    """Most tokens of a document that a bounded layer has to hold after the chunk."""
    if positions is None:
        steps = jnp.arange(length, dtype=jnp.int32)[None]
        positions = cache.next_position[:, None] + steps
    order = jnp.argsort(positions < 0, axis=1, stable=True)
    return jnp.max(cache_lib.tokens_held(cache, reorder(positions, order)))


def kind_of(value: Any) -> str:
    """What an argument is, for an error."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def _check_inputs(config, tokens, positions, cache):
    if not hasattr(tokens, "dtype") or tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            "tokens: expected an array int32 [B, T] with B and T at least 1, got "
            f"{kind_of(tokens)}; for one text pass jnp.array([ids])"
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens: expected integers, got {tokens.dtype}; pass token ids"
        )
    if not isinstance(tokens, jax.core.Tracer):
        known = np.asarray(tokens)
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"tokens: expected ids from 0 to {config.vocab_size - 1}, got "
                f"{low if low < 0 else high}; use the tokenizer of this model"
            )
    if positions is not None and (
        getattr(positions, "shape", None) != tokens.shape
        or not jnp.issubdtype(positions.dtype, jnp.integer)
    ):
        raise ValueError(
            f"positions: expected integers of the shape of tokens, "
            f"{list(tokens.shape)}, got {kind_of(positions)}; pass None to continue rows"
        )
    if cache is None:
        return
    if not isinstance(cache, Cache):
        refuse(
            "cache", "a Cache or None", cache, "pass what a call or init_cache gives"
        )
    if cache.batch_size != tokens.shape[0]:
        raise ValueError(
            f"cache: expected {tokens.shape[0]} rows as in tokens, got "
            f"{cache.batch_size}; use take, repeat or concatenate on the cache"
        )
    if len(cache.layers) != config.num_layers:
        raise ValueError(
            f"cache: expected {config.num_layers} layers, got {len(cache.layers)}; it "
            "belongs to another model"
        )
    for i, (kind, state) in enumerate(
        zip(config.block_types, cache.layers, strict=True)
    ):
        mixer = TEMPORAL_MIXERS[kind]
        expected, found = _own_state_form(config, mixer), _state_form(mixer, state)
        if found != expected:
            raise ValueError(
                f"cache: expected in layer {i} the state of a {kind} layer of sizes "
                f"{expected[1]}, got a {type(state).__name__} of sizes {found[1]}; it "
                "belongs to another model"
            )


@functools.lru_cache
def _own_state_form(config, mixer):
    module = mixer.shapes(config)
    return _state_form(mixer, jax.eval_shape(lambda: module.init_state(1, 1)))


def _state_form(mixer, state):
    """What tells the states of models apart; rows, slots and tokens kept do not count."""
    leaves, structure = jax.tree.flatten(state)

    def sizes(leaf):
        if leaf.ndim == 4:  # a ring [B, S, K, H]
            return leaf.shape[2:]
        # A recurrent state [B, ..., E]; the slots of one value each [B, capacity].
        return () if mixer.needs_capacity else leaf.shape[1:][-1:]

    floating = (leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    return structure, [sizes(leaf) for leaf in floating]
