"""What a model costs, from its `GriffinConfig` alone: no weights, no device.

Parameters, cache bytes, FLOPs and bytes moved, each from the shapes of the Griffin
paper (arXiv 2402.19427, section 2). A multiply and an add are 2 FLOPs. Counted are the
matrix products, the attention scores and sums, the convolution and the recurrence;
norms, gates, softmax and other element-wise work are below 1 % at every preset and left
out, as is usual (Kaplan et al., arXiv 2001.08361, section 2.1).
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from recurrentgemma.config import GriffinConfig

_FLOAT32_BYTES = 4
_INT32_BYTES = 4
_BACKWARD_PER_FORWARD = 2


def parameter_counts(config: GriffinConfig) -> dict[str, int]:
    """Parameters by part of the model.

    Returns:
      embedding (V D, tied with the output), recurrent blocks (of every kind), attention
      blocks, MLPs and norms; the sum is the size of the model.
    """
    mixers = {"recurrent blocks": 0, "attention blocks": 0}
    for block_type in config.block_types:
        part = "attention" if block_type in _ATTENTION else "recurrent"
        mixers[f"{part} blocks"] += sum(_MIXER_PARAMETERS[block_type](config))
    norms = 1 + config.num_layers * (4 if config.post_norms else 2)
    return {
        "embedding": config.vocab_size * config.width,
        **mixers,
        "MLPs": config.num_layers * sum(_mlp_parameters(config)),
        "norms": norms * config.width,
    }


def num_parameters(config: GriffinConfig) -> int:
    """All parameters; 2,682,862,080 for recurrentgemma-2b."""
    return sum(parameter_counts(config).values())


def parameter_bytes(config: GriffinConfig, dtype: DTypeLike) -> int:
    """Bytes of the parameters for inference.

    Matrices are in `dtype`; norm scales, biases, the convolution and `a_param` stay in
    float32.
    """
    matrices = _matrix_parameters(config) + config.vocab_size * config.width
    others = num_parameters(config) - matrices
    return matrices * jnp.dtype(dtype).itemsize + others * _FLOAT32_BYTES


def cache_bytes(
    config: GriffinConfig,
    batch_size: int = 1,
    *,
    dtype: DTypeLike = "bfloat16",
    capacity: int | None = None,
) -> int:
    """Bytes of the generation cache.

    A recurrent layer keeps its float32 state and the last conv_width - 1 inputs of its
    convolution (a minGRU its state alone), a local-attention layer the keys and values
    of W tokens, whatever the length of the text: 17.2 MB for recurrentgemma-2b in
    bfloat16. A global-attention layer keeps the keys and values of `capacity` tokens.

    Args:
      config: the model.
      batch_size: B.
      dtype: of keys, values and convolution inputs, the compute dtype.
      capacity: tokens that global attention can hold.

    Raises:
      ValueError: the model has global attention and no capacity is given.
    """
    types = config.block_types
    if "global_attention" in types and capacity is None:
        raise ValueError(
            "capacity: expected how many tokens the cache of global attention holds, "
            "got None"
        )
    itemsize = jnp.dtype(dtype).itemsize
    key_value = 2 * config.num_kv_heads * config.head_dim * itemsize
    convolution = (config.conv_width - 1) * config.lru_width * itemsize
    row = _INT32_BYTES  # the position of the next token
    state = config.lru_width * _FLOAT32_BYTES
    row += types.count("recurrent") * (state + convolution)
    row += types.count("min_gru") * state
    # The positions of the keys are shared by the layers that see the same ones.
    for block_type, slots in (
        ("local_attention", config.attention_window),
        ("global_attention", capacity or 0),
    ):
        if block_type in types:
            row += slots * (types.count(block_type) * key_value + _INT32_BYTES)
    return batch_size * row


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
    types = config.block_types
    flops = 2.0 * (_matrix_parameters(config) + config.vocab_size * config.width)
    scan = 4 if config.complex_rg_lru else 2
    flops += (
        types.count("recurrent") * config.lru_width * (2 * config.conv_width + scan)
    )
    flops += types.count("min_gru") * config.lru_width * 2
    per_key = 4 * config.num_heads * config.head_dim
    for block_type, window in (
        ("local_attention", config.attention_window),
        ("global_attention", length),
    ):
        flops += types.count(block_type) * per_key * _mean_keys(length, window)
    return flops


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
    """
    cache = cache_bytes(config, batch_size, dtype=dtype, capacity=capacity)
    return parameter_bytes(config, dtype) + cache


def _recurrent_parameters(config):
    """(matrices, the rest) of a recurrent block."""
    d, e = config.width, config.lru_width
    # A complex RG-LRU has one gate value for the two parts of a number.
    gated = e // 2 if config.complex_rg_lru else e
    gates = 2 * e * (gated // config.num_gate_blocks)
    matrices = 2 * d * e + e * d + gates
    biases = 2 * e + d + 2 * gated
    convolution = (config.conv_width + 1) * e
    return matrices, biases + convolution + e  # and a_param, a_imag_param


def _min_gru_parameters(config):
    """(matrices, the rest) of a minGRU block."""
    d, e = config.width, config.lru_width
    return 3 * d * e, 2 * e + d


def _attention_parameters(config):
    """(matrices, the rest) of an attention block."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    matrices = config.width * heads * config.head_dim
    return matrices, config.width if config.attention_bias else 0


def _mlp_parameters(config):
    """(matrices, the rest) of a gated MLP."""
    biases = 2 * config.mlp_width + config.width
    return 3 * config.width * config.mlp_width, biases if config.mlp_bias else 0


_ATTENTION = ("local_attention", "global_attention")
_MIXER_PARAMETERS = {
    "recurrent": _recurrent_parameters,
    "min_gru": _min_gru_parameters,
    **dict.fromkeys(_ATTENTION, _attention_parameters),
}


def _matrix_parameters(config):
    """Parameters of all matrices but the embedding."""
    mixers = (_MIXER_PARAMETERS[kind](config)[0] for kind in config.block_types)
    return sum(mixers) + config.num_layers * _mlp_parameters(config)[0]


def _mean_keys(length, window):
    """Keys that a query sees, its own among them, averaged over a sequence."""
    seen = min(length, window + 1)
    ramp = seen * (seen + 1) / 2  # the first queries see 1, 2, ... keys
    return (ramp + (length - seen) * seen) / length


def _check_length(length):
    if length < 1:
        raise ValueError(f"length: expected at least 1 token, got {length}")
