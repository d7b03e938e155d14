"""The recurrent block (Griffin, section 2.3 and figure 2c).

y = W_out (gelu(W_y x + b_y) * RGLRU(conv1d(W_x x + b_x))) + b_out
"""

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma.cache import Chunk, RecurrentState, RewindableState
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.layers import RGLRU, CausalConv1D, ComplexRGLRU, Linear


class RecurrentBlock(nnx.Module):
    """A convolution and an RG-LRU beside a gelu branch."""

    def __init__(self, config: GriffinConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        width, lru_width = config.width, config.lru_width
        self.linear_x = Linear(width, lru_width, rngs=rngs)
        self.linear_y = Linear(width, lru_width, rngs=rngs)
        self.conv_1d = CausalConv1D(lru_width, config.conv_width, rngs=rngs)
        unit = ComplexRGLRU if config.complex_rg_lru else RGLRU
        self.rg_lru = unit(lru_width, config.num_gate_blocks, runtime, rngs=rngs)
        self.linear_out = Linear(
            lru_width, width, init_variance=2 / config.num_layers, rngs=rngs
        )
        self.config = config
        self.runtime = runtime

    def __call__(
        self, x: jax.Array, chunk: Chunk, state: RecurrentState | RewindableState | None
    ) -> tuple[jax.Array, RecurrentState | RewindableState]:
        """x [B, T, D] -> y [B, T, D] in x's dtype, and the state after the chunk."""
        if state is None:
            state = self.init_state(x.shape[0])
        with jax.named_scope("recurrent_block"):
            gate = jax.nn.gelu(self.linear_y(x), approximate=True)
            u, conv = self.conv_1d(self.linear_x(x), chunk, state.conv)
            with jax.named_scope("rg_lru"):
                if isinstance(state, RewindableState):
                    h = self.rg_lru.states(u, chunk, state.h[:, -1])
                    y = h.astype(u.dtype)
                    state = RewindableState(state.keep_last(h, chunk.lengths), conv)
                else:
                    y, h = self.rg_lru(u, chunk, state.h)
                    state = RecurrentState(h, conv)
            return self.linear_out(y * gate), state

    def init_state(self, batch_size: int, capacity: int | None = None):
        """The state before any token; capacity is not used."""
        config = self.config
        conv_shape = (batch_size, config.conv_width - 1, config.lru_width)
        return RecurrentState(
            h=jnp.zeros((batch_size, config.lru_width), jnp.float32),
            conv=jnp.zeros(conv_shape, self.runtime.dtype),
        )
