"""A temporal mixer as a user writes one: three methods, registered by name."""

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.blocks.mixer import Mixer
from recurrentgemma.kernels import linear_scan
from recurrentgemma.layers import Linear

NAME = "moving_average"


class MovingAverage(Mixer):
    """h_t = a h_{t-1} + (1 - a) W x_t with a learned a for each channel; y = V h."""

    def __init__(self, config, runtime, *, rngs):
        self.linear_in = Linear(config.width, config.lru_width, rngs=rngs)
        self.linear_out = Linear(config.lru_width, config.width, rngs=rngs)
        self.decay_logits = nnx.Param(jnp.ones([config.lru_width]))
        self.width = config.lru_width

    def __call__(self, x, chunk, state):
        a = jax.nn.sigmoid(self.decay_logits[...].astype(jnp.float32))[None, None]
        holds = (chunk.positions < 0)[..., None]
        starts = (chunk.positions == 0)[..., None]
        u = self.linear_in(x).astype(jnp.float32)
        h, state = linear_scan(
            jnp.where(holds, 0.0, (1 - a) * u),
            jnp.where(holds, 1.0, jnp.where(starts, 0.0, a)),
            state,
        )
        return self.linear_out(h.astype(x.dtype)), state

    def init_state(self, batch_size, capacity=None):
        return jnp.zeros((batch_size, self.width), jnp.float32)


def register():
    TEMPORAL_MIXERS[NAME] = MovingAverage
