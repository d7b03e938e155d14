"""The recurrent block (Griffin, section 2.3 and figure 2c).

y = W_out (gelu(W_y x + b_y) * RGLRU(conv1d(W_x x + b_x))) + b_out
"""

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma.cache import Chunk, RecurrentState, RewindableState
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.kernels.recurrent_step import StepParameters, recurrent_step
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
            u = self.linear_x(x)
            one_token = x.shape[1] == 1 and isinstance(state, RecurrentState)
            if one_token and not self.config.complex_rg_lru:
                y, state = self._step(u, chunk, state)
            else:
                y, state = self._read(u, chunk, state)
            return self.linear_out(y * gate), state

    def _read(self, u, chunk, state):
        """Convolution and RG-LRU of a chunk of any length."""
        u, conv = self.conv_1d(u, chunk, state.conv)
        with jax.named_scope("rg_lru"):
            if isinstance(state, RewindableState):
                h = self.rg_lru.states(u, chunk, state.h[:, -1])
                y = h.astype(u.dtype)
                return y, RewindableState(state.keep_last(h, chunk.lengths), conv)
            y, h = self.rg_lru(u, chunk, state.h)
            return y, RecurrentState(h, conv)

    def _step(self, u, chunk, state):
        """The same of one token a row."""
        parameters = StepParameters(
            self.conv_1d.kernel[...],
            self.conv_1d.bias[...],
            self.rg_lru.recurrence_gate.gate,
            self.rg_lru.input_gate.gate,
            self.rg_lru.a_param[...],
        )
        with jax.named_scope("recurrent_step"):
            y, h, conv = recurrent_step(
                u[:, 0],
                parameters,
                chunk.positions[:, 0],
                state.h,
                state.conv,
                implementation=self.runtime.recurrent_step,
            )
        return y[:, None], RecurrentState(h, conv)

    def init_state(self, batch_size: int, capacity: int | None = None):
        """The state before any token; capacity is not used."""
        config = self.config
        conv_shape = (batch_size, config.conv_width - 1, config.lru_width)
        return RecurrentState(
            h=jnp.zeros((batch_size, config.lru_width), jnp.float32),
            conv=jnp.zeros(conv_shape, self.runtime.dtype),
        )
