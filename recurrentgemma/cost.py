"""What a model costs, from its `GriffinConfig` alone: no weights, no device.

Parameters, cache bytes, FLOPs and bytes moved. A temporal mixer's parameters and state
are counted from shapes; its class adds what it computes besides matrix products. A
multiply and an add are 2 FLOPs. Counted are the
matrix products, the attention scores and sums, the convolution and the recurrence;
norms, gates, softmax and other element-wise work are below 1 % at every preset and left
out, as is usual (Kaplan et al., arXiv 2001.08361, section 2.1).
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from recurrentgemma._validation import positive_integer
from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.cache import grows
from recurrentgemma.config import GriffinConfig

_FLOAT32_BYTES = 4
_INT32_BYTES = 4
_INT8_BYTES = 1
_BACKWARD_PER_FORWARD = 2


def parameter_counts(config: GriffinConfig) -> dict[str, int]:
    """Parameters by part of the model.

    Returns:
      embedding (V D, tied with the output), recurrent blocks, attention blocks, the
      parts that other mixers name, MLPs and norms; the sum is the size of the model.
    """
    mixers = {"recurrent blocks": 0, "attention blocks": 0}
    for mixer in _mixers(config):
        count = sum(_mixer_parameters(mixer, config))
        mixers[mixer.part] = mixers.get(mixer.part, 0) + count
    norms = 1 + config.num_layers * _norms_of_a_block(config)
    return {
        "embedding": config.vocab_size * config.width,
        **mixers,
        "MLPs": config.num_layers * sum(_mlp_parameters(config)),
        "norms": norms * config.width,
    }


def num_parameters(config: GriffinConfig) -> int:
    """All parameters; 2,682,862,080 for recurrentgemma-2b."""
    return sum(parameter_counts(config).values())


def parameter_bytes(
    config: GriffinConfig, dtype: DTypeLike, *, quantized: bool = False
) -> int:
    """Bytes of the parameters for inference.

    Matrices are in `dtype`; norm scales, biases, the convolution and `a_param` stay in
    float32. Quantised, linear layers and the embedding are int8 with a float32 scale
    for each output channel or token.
    """
    embedding = config.vocab_size * config.width
    matrices = _matrix_parameters(config) + embedding
    others = num_parameters(config) - matrices
    size = matrices * jnp.dtype(dtype).itemsize + others * _FLOAT32_BYTES
    if not quantized:
        return size
    linear, channels = _linear_parameters(config)
    saved = (linear + embedding) * (jnp.dtype(dtype).itemsize - _INT8_BYTES)
    return size - saved + (channels + config.vocab_size) * _FLOAT32_BYTES


def cache_bytes(
    config: GriffinConfig,
    batch_size: int = 1,
    *,
    dtype: DTypeLike = "bfloat16",
    capacity: int | None = None,
) -> int:
    """Bytes of the generation cache.

    A recurrent layer keeps its float32 state and the last conv_width - 1 inputs of its
    convolution, a local-attention layer the keys and values
    of W tokens and their positions, whatever the length of the text: 17.3 MB for
    recurrentgemma-2b in bfloat16. A global-attention layer keeps those of `capacity`
    tokens, and no local one beside it keeps more.

    Args:
      config: the model.
      batch_size: B.
      dtype: of keys, values and convolution inputs, the compute dtype.
      capacity: tokens that global attention can hold.

    Raises:
      ValueError: the model has global attention and no capacity is given.
    """
    if grows(config) and capacity is None:
        raise ValueError(
            "capacity: expected how many tokens the cache of global attention holds, "
            "got None"
        )
    name = jnp.dtype(dtype).name
    row = sum(_state_bytes(m, config, name, capacity) for m in _mixers(config))
    return batch_size * (row + _INT32_BYTES)  # and the position of the next token


def forward_flops_per_token(config: GriffinConfig, length: int) -> float:
    """FLOPs of the forward pass with logits, a token, averaged over a sequence.

    2 for each matrix parameter (the embedding counts once, as the output projection),
    2 for each tap of the convolution, 2 for each channel of the recurrence (4 if it is
    complex), and 4 N H for each key that a query sees: the score and the weighted sum.

    Args:
      config: the model.
      length: T, tokens of the sequence; at least 1.
    """
    _check_length(length)
    flops = 2.0 * (_matrix_parameters(config) + config.vocab_size * config.width)
    return flops + sum(mixer.other_flops(config, length) for mixer in _mixers(config))


def train_flops_per_token(config: GriffinConfig, length: int) -> float:
    """FLOPs of a train step, a token, averaged over a sequence of `length` tokens.

    The backward pass takes twice the forward pass (arXiv 2001.08361, section 2.1);
    recomputed activations are not counted, so that utilisation is that of the model.
    """
    return (1 + _BACKWARD_PER_FORWARD) * forward_flops_per_token(config, length)


def decode_bytes(
    config: GriffinConfig,
    batch_size: int = 1,
    *,
    dtype: DTypeLike = "bfloat16",
    capacity: int | None = None,
    quantized: bool = False,
) -> int:
    """Bytes that a decode step must move: the limit of its speed.

    All parameters once and the whole cache once (keys and values are read; what is
    written, one token and the recurrent states, is small beside it and left out).
    Divided by the memory bandwidth this is the least time of a step (Griffin paper,
    section 4.1).

    Args:
      config: the model.
      batch_size: B.
      dtype: of matrices, keys and values, the compute dtype.
      capacity: tokens in the cache of global attention.
      quantized: whether the model was loaded with quantize="int8".
    """
    cache = cache_bytes(config, batch_size, dtype=dtype, capacity=capacity)
    return parameter_bytes(config, dtype, quantized=quantized) + cache


def _mlp_parameters(config):
    """(matrices, the rest) of a gated MLP."""
    if not config.mlp_width:
        return 0, 0
    biases = 2 * config.mlp_width + config.width
    return 3 * config.width * config.mlp_width, biases if config.mlp_bias else 0


def _norms_of_a_block(config):
    """One before the mixer and one before the MLP, or also one after each."""
    return (2 if config.mlp_width else 1) * (2 if config.post_norms else 1)


@functools.lru_cache
def _mixer_parameters(mixer, config):
    """(matrices, the rest) of a temporal mixer of this class."""
    matrices = rest = 0
    leaves, _ = jax.tree_util.tree_flatten_with_path(mixer.shapes(config))
    for path, leaf in leaves:
        # The last key is the variable's.
        name = jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        if mixer.is_multiplied(name):
            matrices += leaf.size
        else:
            rest += leaf.size
    return matrices, rest


@functools.lru_cache
def _state_bytes(mixer, config, dtype, capacity):
    """Bytes of a row's state in a layer of this class."""
    shapes = mixer.shapes(config, dtype)
    state = jax.eval_shape(lambda: shapes.init_state(1, capacity))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _mixers(config):
    """The class of each layer's temporal mixer, which must take this config."""
    for kind in set(config.block_types):
        TEMPORAL_MIXERS[kind].check_config(config)
    return [TEMPORAL_MIXERS[kind] for kind in config.block_types]


def _matrix_parameters(config):
    """Parameters of all matrices but the embedding."""
    mixers = (_mixer_parameters(mixer, config)[0] for mixer in _mixers(config))
    return sum(mixers) + config.num_layers * _mlp_parameters(config)[0]


def _linear_parameters(config):
    """(parameters, output channels) of the matrices of linear layers."""
    width, hidden = config.width, config.mlp_width
    found = [(width * hidden, hidden)] * 2 + [(hidden * width, width)]
    counts = found * config.num_layers if hidden else []
    for mixer in _mixers(config):
        counts += _linear_of_mixer(mixer, config)
    return (sum(part) for part in zip(*counts, strict=True)) if counts else (0, 0)


@functools.lru_cache
def _linear_of_mixer(mixer, config):
    """(parameters, output channels) of each; gates are matrices of three axes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(mixer.shapes(config))
    return [
        (leaf.size, leaf.shape[1])
        for path, leaf in leaves
        if leaf.ndim == 2
        and mixer.is_multiplied(
            jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        )
    ]


def _check_length(length):
    positive_integer("length", length)
