"""The residual block (Griffin, section 2.1): x + mixer(norm(x)), then x + mlp(norm(x))."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma._compat import value_of
from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.blocks.mlp import GatedMLP
from recurrentgemma.chunk import Chunk
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.layers import Linear, RMSNorm
from recurrentgemma.matrices import is_matrix


class ResidualBlock(nnx.Module):
    """A temporal-mixing block and an MLP, each normalised and added to the stream."""

    def __init__(
        self,
        config: GriffinConfig,
        runtime: Runtime,
        block_type: str,
        *,
        rngs: nnx.Rngs,
    ):
        width = config.width
        self.temporal_pre_norm = RMSNorm(width)
        mixer = TEMPORAL_MIXERS[block_type]
        mixer.check_config(config)
        self.mixer = mixer(config, runtime, rngs=rngs)
        self.temporal_post_norm = RMSNorm(width) if config.post_norms else None
        self.has_mlp = config.mlp_width > 0
        if self.has_mlp:
            self.channel_pre_norm = RMSNorm(width)
            self.mlp = GatedMLP(config, rngs=rngs)
            self.channel_post_norm = RMSNorm(width) if config.post_norms else None

    def __call__(self, x: jax.Array, chunk: Chunk, state: Any) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> [B, T, D], and the mixer's state after the chunk.

        Observed, [B, T, D]: `mixer` and `mlp`, what each adds to the stream before a
        post norm, and `residual`, the stream after the block.
        """
        x_norm = self.temporal_pre_norm(x)
        y, state = self.mixer(x_norm, chunk.within("mixer"), state)
        y = chunk.observe("mixer", y)
        if self.temporal_post_norm is not None:
            y = self.temporal_post_norm(y)
        x = x + y
        if not self.has_mlp:
            return chunk.observe("residual", x), state
        with jax.named_scope("mlp_block"):
            y = chunk.observe("mlp", self.mlp(self.channel_pre_norm(x)))
            if self.channel_post_norm is not None:
                y = self.channel_post_norm(y)
            return chunk.observe("residual", x + y), state

    def with_narrow_matrices(self, dtype: jnp.dtype) -> "ResidualBlock":
        """The same block with the matrices of its `Linear` layers in a narrower dtype.

        A layer casts its matrix where it multiplies by it: in the forward pass, again
        where that is recomputed, and for the gradient. Cast beforehand, a matrix is read
        in fewer bytes each time. Numbers stay the same. Matrices that the mixer
        multiplies in float32, adapted and quantised ones stay as they are.
        """

        def is_multiplied(path):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            place, _, inner = name.partition(".")
            return place != "mixer" or self.mixer.is_multiplied(f"{inner}.kernel")

        def narrow(path, layer):
            if type(layer) is not Linear or is_matrix(value_of(layer.kernel)):
                return layer
            is_wide = layer.kernel[...].dtype.itemsize > dtype.itemsize
            if not is_wide or not is_multiplied(path):
                return layer
            layer = jax.tree.map(lambda leaf: leaf, layer)
            layer.kernel = jax.tree.map(lambda leaf: leaf.astype(dtype), layer.kernel)
            return layer

        return jax.tree_util.tree_map_with_path(
            narrow, self, is_leaf=lambda node: isinstance(node, Linear)
        )
