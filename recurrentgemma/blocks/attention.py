"""Local and global attention with few key-value heads (Griffin, section 2.3).

Queries, keys and values have no bias, the first part of each head is rotated, and a
query sees itself and the last W keys of its document (all of them, if global).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from recurrentgemma.cache import Chunk
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.kernels import local_attention
from recurrentgemma.kernels.local_attention import KVCache
from recurrentgemma.layers import Linear
from recurrentgemma.rotary import apply_rotary


class LocalAttentionBlock(nnx.Module):
    """Sliding-window attention; its state is a ring of W keys and values."""

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

    @property
    def window(self) -> int | None:
        """Past keys that a query sees; None is all of them."""
        return self.config.attention_window

    def __call__(
        self, x: jax.Array, chunk: Chunk, state: KVCache | None
    ) -> tuple[jax.Array, KVCache]:
        """x [B, T, D] -> y [B, T, D] in x's dtype, and the ring after the chunk."""
        config = self.config
        with jax.named_scope("attention_block"):
            q, k, v = (
                rearrange(proj(x), "b t (n h) -> b t n h", h=config.head_dim)
                for proj in (self.proj_q, self.proj_k, self.proj_v)
            )
            assert chunk.rotary is not None, "attention needs rotary tables"
            y, state = local_attention(
                apply_rotary(q, chunk.rotary),
                apply_rotary(k, chunk.rotary),
                v,
                positions=chunk.positions,
                cache=state,
                window=self.window,
                scale=config.attention_scale,
                soft_cap=config.attention_soft_cap,
                implementation=self.runtime.local_attention,
            )
            return self.proj_out(rearrange(y, "b t n h -> b t (n h)")), state

    def init_state(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty ring; capacity is not used."""
        return self._empty_ring(batch_size, self.config.attention_window)

    def _empty_ring(self, batch_size: int, slots: int) -> KVCache:
        shape = (batch_size, slots, self.config.num_kv_heads, self.config.head_dim)
        return KVCache(
            keys=jnp.zeros(shape, self.runtime.dtype),
            values=jnp.zeros(shape, self.runtime.dtype),
            positions=jnp.full((batch_size, slots), -1, jnp.int32),
        )


class GlobalAttentionBlock(LocalAttentionBlock):
    """Attention to the whole document; its state is a ring of `capacity` entries."""

    @property
    def window(self) -> int | None:
        """None: no bound."""
        return None

    def init_state(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty ring.

        Raises:
          ValueError: capacity is missing or less than 1.
        """
        if capacity is None or capacity < 1:
            raise ValueError(
                "Global attention needs a cache capacity of at least 1 token, got "
                f"{capacity}; pass capacity= to init_cache."
            )
        return self._empty_ring(batch_size, capacity)
