"""The minimal gated recurrent unit: minGRU of arXiv 2410.01201, section 3.1.

    z_t = sigmoid(W_z x_t + b_z)
    h_t = (1 - z_t) h_{t-1} + z_t (W_h x_t + b_h),      y_t = W_out h_t + b_out

A gated recurrence whose gates see the input alone is a linear scan. The state has
`lru_width` channels; gates and state are float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma.blocks import history
from recurrentgemma.blocks.mixer import Mixer
from recurrentgemma.chunk import Chunk
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.kernels import linear_scan
from recurrentgemma.layers import Linear
from recurrentgemma.observed import replaced_states

_FLOPS_PER_CHANNEL = 2


class MinGRUBlock(Mixer):
    """minGRU between two linear layers.

    Its state is h, float32 [B, E]; where K tokens may be taken back the states after
    each of the last 1 + K tokens, float32 [B, 1 + K, E].
    """

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
        """x [B, T, D] -> y [B, T, D] in x's dtype, and the state after the chunk.

        Observed, float32 [B, T, E]: `update_gate` (z), `decay` (1 - z) and `state`.
        """
        with jax.named_scope("min_gru_block"):
            logits = self.linear_z(x).astype(jnp.float32)
            candidate = self.linear_h(x).astype(jnp.float32)
            update = chunk.observe("update_gate", jax.nn.sigmoid(logits))
            # sigmoid(-z) is 1 - sigmoid(z) with all its digits.
            replaced = chunk.replaces("update_gate")
            kept = 1 - update if replaced else jax.nn.sigmoid(-logits)
            kept = chunk.observe("decay", kept)
            starts = (chunk.positions == 0)[..., None]
            holds = (chunk.positions < 0)[..., None]
            is_rewindable = state is not None and state.ndim > 2
            inputs = (
                jnp.where(holds, 0.0, update * candidate),
                jnp.where(holds, 1.0, jnp.where(starts, 0.0, kept)),
            )
            h0 = state[:, -1] if state is not None and is_rewindable else state
            if chunk.replaces("state"):
                h0 = self.init_state(x.shape[0]) if h0 is None else h0
                h = replaced_states(inputs, h0, chunk)
                last = h[:, -1]
            else:
                implementation = self.runtime.linear_scan
                h, last = linear_scan(*inputs, h0, implementation=implementation)
            chunk.show("state", h)
            if state is not None and is_rewindable:
                last = history.extend(state, h, chunk.lengths)
            return self.linear_out(h.astype(x.dtype)), last

    def init_state(self, batch_size: int, capacity: int | None = None) -> jax.Array:
        """The state before any token; capacity is not used."""
        return jnp.zeros((batch_size, self.config.lru_width), jnp.float32)

    @classmethod
    def other_flops(cls, config: GriffinConfig, length: int) -> float:
        """The recurrence, for each channel."""
        return config.lru_width * _FLOPS_PER_CHANNEL

    @classmethod
    def make_rewindable(
        cls,
        config: GriffinConfig,
        state: jax.Array,
        count: int,
        capacity: int | None,
    ) -> jax.Array:
        """Keeps the states of 1 + count tokens."""
        states = state if state.ndim > 2 else state[:, None]
        return history.keep_newest(states, 1 + count) if count else states[:, -1]

    @classmethod
    def rewind(
        cls,
        config: GriffinConfig,
        state: jax.Array,
        counts: jax.Array,
        next_position: jax.Array,
    ) -> jax.Array:
        """See `Mixer.rewind`."""
        del config, next_position
        return history.step_back(state, counts)
