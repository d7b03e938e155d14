"""The gated MLP: gelu(x W_gate + b) * (x W_up + b), then W_down (Griffin, section 2)."""

import jax
from flax import nnx

from recurrentgemma.config import GriffinConfig
from recurrentgemma.layers import Linear


class GatedMLP(nnx.Module):
    """GeGLU with the tanh approximation of gelu."""

    def __init__(self, config: GriffinConfig, *, rngs: nnx.Rngs):
        width, hidden, bias = config.width, config.mlp_width, config.mlp_bias
        self.gate = Linear(width, hidden, use_bias=bias, rngs=rngs)
        self.up = Linear(width, hidden, use_bias=bias, rngs=rngs)
        self.down = Linear(
            hidden,
            width,
            use_bias=bias,
            init_variance=2 / config.num_layers,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D] in x's dtype."""
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))
