"""The minimal gated recurrent unit: minGRU of arXiv 2410.01201, section 3.1.

    z_t = sigmoid(W_z x_t + b_z)
    h_t = (1 - z_t) h_{t-1} + z_t (W_h x_t + b_h),      y_t = W_out h_t + b_out

A gated recurrence whose gates see the input alone is a linear scan. The state has
`lru_width` channels; gates and state are float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma.cache import Chunk
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.kernels import linear_scan
from recurrentgemma.layers import Linear


class MinGRUBlock(nnx.Module):
    """minGRU between two linear layers; its state is h, float32 [B, E]."""

    def __init__(self, config: GriffinConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        width, state_width = config.width, config.lru_width
        self.linear_z = Linear(width, state_width, rngs=rngs)
        self.linear_h = Linear(width, state_width, rngs=rngs)
        self.linear_out = Linear(
            state_width, width, init_variance=2 / config.num_layers, rngs=rngs
        )
        self.config = config
        self.runtime = runtime

    def __call__(
        self, x: jax.Array, chunk: Chunk, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D] -> y [B, T, D] in x's dtype, and the state after the chunk."""
        with jax.named_scope("min_gru_block"):
            logits = self.linear_z(x).astype(jnp.float32)
            candidate = self.linear_h(x).astype(jnp.float32)
            starts = (chunk.positions == 0)[..., None]
            holds = (chunk.positions < 0)[..., None]
            # sigmoid(-z) is 1 - sigmoid(z) with all its digits.
            kept = jnp.where(starts, 0.0, jax.nn.sigmoid(-logits))
            y, state = linear_scan(
                jnp.where(holds, 0.0, jax.nn.sigmoid(logits) * candidate),
                jnp.where(holds, 1.0, kept),
                state,
                implementation=self.runtime.linear_scan,
            )
            return self.linear_out(y.astype(x.dtype)), state

    def init_state(self, batch_size: int, capacity: int | None = None) -> jax.Array:
        """The state before any token; capacity is not used."""
        return jnp.zeros((batch_size, self.config.lru_width), jnp.float32)
