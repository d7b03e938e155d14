"""Local and global attention with few key-value heads (Griffin, section 2.3).

Queries, keys and values have no bias, the first part of each head is rotated, and a
query sees itself and the last W keys of its document (all of them, if global).

In a model with global attention no document is longer than the cache's capacity. Where
that is less than W, the ring of a local layer has `capacity` slots and no token ever
leaves it, so that its window is the whole document.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma._validation import refuse
from recurrentgemma.blocks.mixer import Mixer
from recurrentgemma.cache import OVERFLOWN, grows
from recurrentgemma.chunk import Chunk
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.kernels import local_attention
from recurrentgemma.kernels.local_attention import KVCache, reference
from recurrentgemma.kernels.local_attention.chunk import Chunk as Inputs
from recurrentgemma.kernels.local_attention.chunk import Settings
from recurrentgemma.layers import Linear
from recurrentgemma.rotary import apply_rotary


class LocalAttentionBlock(Mixer):
    """Sliding-window attention; its state is a ring of W keys and values, of fewer
    where a model with global attention has less capacity."""

    part: ClassVar[str] = "attention blocks"
    uses_rotary: ClassVar[bool] = True

    def __init__(self, config: GriffinConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        width, head_dim = config.width, config.head_dim
        q_width = config.num_heads * head_dim
        kv_width = config.num_kv_heads * head_dim
        self.proj_q = Linear(width, q_width, use_bias=False, rngs=rngs)
        self.proj_k = Linear(width, kv_width, use_bias=False, rngs=rngs)
        self.proj_v = Linear(width, kv_width, use_bias=False, rngs=rngs)
        self.proj_out = Linear(
            q_width,
            width,
            use_bias=config.attention_bias,
            init_variance=2 / config.num_layers,
            rngs=rngs,
        )
        self.config = config
        self.runtime = runtime

    @classmethod
    def check_config(cls, config: GriffinConfig) -> None:
        """See `Mixer.check_config`."""
        if config.num_heads % config.num_kv_heads:
            refuse(
                "num_heads",
                f"a multiple of num_kv_heads ({config.num_kv_heads})",
                config.num_heads,
            )
        if (config.rope_fraction * config.head_dim) % 2:
            refuse(
                "rope_fraction",
                f"an even part of head_dim ({config.head_dim})",
                config.rope_fraction,
            )

    def window(self, length: int, state: KVCache | None) -> int | None:
        """Number of past keys that a query sees; None is all of its document.

        Args:
          length: T, number of tokens of the chunk.
          state: the ring before the chunk.
        """
        window = self.config.attention_window
        if not grows(self.config):
            return window
        slots = length if state is None else state.positions.shape[1]
        return window if slots >= window else None

    def __call__(
        self, x: jax.Array, chunk: Chunk, state: KVCache | None
    ) -> tuple[jax.Array, KVCache]:
        """x [B, T, D] -> y [B, T, D] in x's dtype, and the ring after the chunk.

        Observed, in x's dtype: `queries` [B, T, N, H], `keys` and `values` [B, T, K, H]
        before the rotary embedding, and `heads` [B, T, N, H], the weighted sums;
        `probabilities`, float32 [B, T, N, S + T]: the weights of the S slots of the
        ring before the chunk (none without a state), then those of the chunk's tokens.
        """
        config = self.config
        with jax.named_scope("attention_block"):
            q, k, v = (
                chunk.observe(name, proj.to_heads(x, config.head_dim))
                for name, proj in (
                    ("queries", self.proj_q),
                    ("keys", self.proj_k),
                    ("values", self.proj_v),
                )
            )
            assert chunk.rotary is not None, "attention needs rotary tables"
            q, k = (apply_rotary(x, chunk.rotary) for x in (q, k))
            options = {
                "window": self.window(x.shape[1], state),
                "scale": config.attention_scale,
                "soft_cap": config.attention_soft_cap,
            }
            before = state
            y, state = local_attention(
                q,
                k,
                v,
                positions=chunk.positions,
                cache=before,
                implementation=self.runtime.local_attention,
                **options,
            )
            if chunk.sees("probabilities"):
                seen = _observed_heads(q, k, v, before, chunk, options)
                y = seen if chunk.replaces("probabilities") else y
            y = chunk.observe("heads", y)
            return self.proj_out.from_heads(y), state

    def init_state(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty ring; only in a model with global attention is capacity used."""
        return self._empty_ring(batch_size, _local_slots(self.config, capacity))

    def _empty_ring(self, batch_size: int, slots: int) -> KVCache:
        shape = (batch_size, slots, self.config.num_kv_heads, self.config.head_dim)
        return KVCache(
            keys=jnp.zeros(shape, self.runtime.dtype),
            values=jnp.zeros(shape, self.runtime.dtype),
            positions=jnp.full((batch_size, slots), -1, jnp.int32),
        )

    @classmethod
    def other_flops(cls, config: GriffinConfig, length: int) -> float:
        """4 N H for each key that a query sees: the score and the weighted sum."""
        return _attention_flops(config, length, config.attention_window)

    @classmethod
    def grow(
        cls, config: GriffinConfig, state: KVCache, before: int, capacity: int
    ) -> KVCache:
        """The ring with the slots of another capacity, and as many for `rewind`."""
        spare = state.positions.shape[1] - _local_slots(config, before)
        return _resize(state, _local_slots(config, capacity) + spare)

    @classmethod
    def make_rewindable(
        cls, config: GriffinConfig, state: KVCache, count: int, capacity: int | None
    ) -> KVCache:
        """A ring of `count` slots more."""
        return _resize(state, _local_slots(config, capacity) + count)

    @classmethod
    def rewind(
        cls,
        config: GriffinConfig,
        state: KVCache,
        counts: jax.Array,
        next_position: jax.Array,
    ) -> KVCache:
        """The ring without the keys from `next_position` on."""
        del config, counts
        is_kept = state.positions < next_position[:, None]
        return state._replace(positions=jnp.where(is_kept, state.positions, -1))


LOST = -2
"""The position in every slot of a row that read more tokens than it has slots. It lasts
until the next document, also when tokens are taken back or slots are added."""


class GrowingRing(KVCache):
    """A ring that must hold the whole document: it may not come round to its start."""

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.positions.shape[1]

    @property
    def num_tokens(self) -> jax.Array:
        """Tokens that each row holds, int32 [B]; `OVERFLOWN` if it has lost some."""
        held = jnp.sum(self.positions >= 0, axis=1, dtype=jnp.int32)
        return jnp.where(self.positions[:, 0] == LOST, OVERFLOWN, held)

    def marked(self, lost: jax.Array) -> "GrowingRing":
        """The ring whose rows `lost` [B] say that they have lost tokens."""
        return self._replace(positions=jnp.where(lost[:, None], LOST, self.positions))


class GlobalAttentionBlock(LocalAttentionBlock):
    """Attention to the whole document; its state is a ring of `capacity` entries."""

    needs_capacity: ClassVar[bool] = True

    def window(self, length: int, state: KVCache | None) -> int | None:
        """None: no bound."""
        del length, state

    def __call__(
        self, x: jax.Array, chunk: Chunk, state: GrowingRing | None
    ) -> tuple[jax.Array, GrowingRing]:
        """See `LocalAttentionBlock`; without a state the new ring has T slots."""
        y, written = super().__call__(x, chunk, state)
        ring = GrowingRing(*written)
        if state is None:
            return y, ring
        restarted = jnp.any(chunk.positions == 0, axis=1)
        held = jnp.where(
            restarted, chunk.next_position, state.num_tokens + chunk.lengths
        )
        return y, ring.marked(held > ring.capacity)

    def init_state(self, batch_size: int, capacity: int | None = None) -> GrowingRing:
        """An empty ring.

        Raises:
          ValueError: capacity is missing or less than 1.
        """
        if capacity is None or capacity < 1:
            raise ValueError(
                "capacity: expected at least 1, the tokens that global attention can "
                f"hold, got {capacity}; pass capacity= to init_cache"
            )
        return GrowingRing(*self._empty_ring(batch_size, capacity))

    @classmethod
    def other_flops(cls, config: GriffinConfig, length: int) -> float:
        """4 N H for each key that a query sees: the score and the weighted sum."""
        return _attention_flops(config, length, length)

    @classmethod
    def grow(
        cls, config: GriffinConfig, state: GrowingRing, before: int, capacity: int
    ) -> GrowingRing:
        """A ring of `capacity` slots."""
        del config, before
        resized = GrowingRing(*_resize(state, capacity))
        return resized.marked(state.num_tokens == OVERFLOWN)

    @classmethod
    def make_rewindable(
        cls,
        config: GriffinConfig,
        state: GrowingRing,
        count: int,
        capacity: int | None,
    ) -> GrowingRing:
        """The ring as it is: it holds all tokens anyway."""
        del config, count, capacity
        return state


def _observed_heads(q, k, v, ring, chunk, options):
    """The heads from probabilities that the observer sees and may have replaced."""
    kept = KVCache(k[:, :0], v[:, :0], chunk.positions[:, :0]) if ring is None else ring
    inputs = Inputs(q, k, v, chunk.positions, kept)
    weights, _ = reference.probabilities(inputs, Settings(**options))
    weights = chunk.observe("probabilities", weights, over_tokens=True)
    return reference.weighted_sum(weights, v, kept.values).astype(q.dtype)


def _attention_flops(config: GriffinConfig, length: int, window: int) -> float:
    seen = min(length, window + 1)
    ramp = seen * (seen + 1) / 2  # The first queries see 1, 2, ... keys.
    mean_keys = (ramp + (length - seen) * seen) / length
    return 4 * config.num_heads * config.head_dim * mean_keys


def _local_slots(config: GriffinConfig, capacity: int | None) -> int:
    """Slots of a local ring from which no token can be taken back."""
    if capacity is None or not grows(config):
        return config.attention_window
    return min(config.attention_window, capacity)


def _resize(ring: KVCache, slots: int) -> KVCache:
    """The same entries in a ring of another number of slots, in its own type."""
    if slots == ring.positions.shape[1]:
        return ring
    newest = jnp.max(ring.positions, axis=1, keepdims=True)
    wanted = newest - (newest - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    index = wanted % ring.positions.shape[1]
    held = jnp.take_along_axis(ring.positions, index, axis=1) == wanted
    keys, values = (
        jnp.take_along_axis(entries, index[..., None, None], axis=1)
        for entries in (ring.keys, ring.values)
    )
    return type(ring)(keys, values, jnp.where(held & (wanted >= 0), wanted, -1))
