"""RecurrentGemma in transformers: names and orientation of tensors, and config.json.

`attention_window_size` W of a checkpoint is taken as the window of the trained model,
in which a query sees W keys besides its own; transformers shows it W - 1 of them, so
the two agree for up to W tokens.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from recurrentgemma.checkpoints.stored import WRITER, WRITER_KEY
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig

MODEL_TYPE = "recurrent_gemma"
BLOCK_TYPES = {"recurrent": "recurrent", "attention": "local_attention"}
REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

IGNORED = re.compile(r"lm_head\.weight|model\.normalizer|.*\.rotary_emb\.inv_freq")
"""The tied output projection and buffers, which older files hold."""


class Orientation(NamedTuple):
    """How a tensor is turned on its way in and out."""

    to_native: Callable[[TensorSource], TensorSource]
    from_native: Callable[[TensorSource], TensorSource]


def _from_conv(source: TensorSource) -> TensorSource:
    channels, _, taps = source.shape
    return source.reshaped((channels, taps), axis=0).transposed()


def _to_conv(source: TensorSource) -> TensorSource:
    taps, channels = source.shape
    turned = source.transposed()
    return turned.reshaped((channels, 1, taps), axis=2 * turned.axis)


SAME = Orientation(lambda source: source, lambda source: source)
TRANSPOSED = Orientation(TensorSource.transposed, TensorSource.transposed)
CONVOLUTION = Orientation(_from_conv, _to_conv)
"""[E, 1, taps] and [taps, E]; the last tap is the current token in both."""

TOP_NAMES = {
    "embedder.embedding": ("model.embed_tokens.weight", SAME),
    "final_norm.scale": ("model.final_norm.weight", SAME),
}
LAYER_NAMES = {
    "temporal_pre_norm.scale": ("temporal_pre_norm.weight", SAME),
    "channel_pre_norm.scale": ("channel_pre_norm.weight", SAME),
    "mixer.conv_1d.kernel": ("temporal_block.conv_1d.weight", CONVOLUTION),
    "mixer.conv_1d.bias": ("temporal_block.conv_1d.bias", SAME),
    **{
        f"{ours}.{kind}": (f"{theirs}.{stored}", orientation)
        for ours, theirs in {
            "mlp.gate": "mlp_block.gate_proj",
            "mlp.up": "mlp_block.up_proj",
            "mlp.down": "mlp_block.down_proj",
            "mixer.linear_x": "temporal_block.linear_x",
            "mixer.linear_y": "temporal_block.linear_y",
            "mixer.linear_out": "temporal_block.linear_out",
            "mixer.proj_q": "temporal_block.q_proj",
            "mixer.proj_k": "temporal_block.k_proj",
            "mixer.proj_v": "temporal_block.v_proj",
            "mixer.proj_out": "temporal_block.o_proj",
        }.items()
        for kind, stored, orientation in (
            ("kernel", "weight", TRANSPOSED),
            ("bias", "bias", SAME),
        )
    },
    **{
        f"mixer.rg_lru.{ours}": (f"temporal_block.rg_lru.{theirs}", SAME)
        for ours, theirs in {
            "a_param": "recurrent_param",
            "recurrence_gate.kernel": "recurrent_gate_weight",
            "recurrence_gate.bias": "recurrent_gate_bias",
            "input_gate.kernel": "input_gate_weight",
            "input_gate.bias": "input_gate_bias",
        }.items()
    },
}
NATIVE_TOP_NAMES = {theirs: (ours, turn) for ours, (theirs, turn) in TOP_NAMES.items()}
NATIVE_LAYER_NAMES = {
    theirs: (ours, turn) for ours, (theirs, turn) in LAYER_NAMES.items()
}


def to_stored_name(name: str) -> tuple[str, Orientation]:
    """The name that transformers has for a native one, and the orientation."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        stored, orientation = LAYER_NAMES.get(match[2], (match[2], SAME))
        return f"model.layers.{match[1]}.{stored}", orientation
    return TOP_NAMES.get(name, (name, SAME))


def to_native_name(name: str) -> tuple[str, Orientation]:
    """The native name of a stored one, or the same if it is unknown."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match and match[2] in NATIVE_LAYER_NAMES:
        native, orientation = NATIVE_LAYER_NAMES[match[2]]
        return f"blocks.{match[1]}.{native}", orientation
    return NATIVE_TOP_NAMES.get(name, (name, SAME))


def config_from_json(content: Mapping[str, Any]) -> GriffinConfig:
    """The architecture that a config.json of transformers describes.

    Raises:
      ValueError: it is of another model, lacks a size, or has settings that no released
        checkpoint has.
    """
    if content.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"model_type is {content.get('model_type')!r}; expected {MODEL_TYPE!r}."
        )
    missing = [key for key in REQUIRED_SIZES if key not in content]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}.")
    for key in REQUIRED_SIZES:
        if not isinstance(content[key], int) or content[key] < 1:
            raise ValueError(f"{key} is {content[key]!r}; expected a positive integer.")
    rope = content.get("rope_parameters") or content
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters is {rope!r}; expected an object.")  # noqa: TRY004
    required = {
        "hidden_activation": (content.get("hidden_activation"), "gelu_pytorch_tanh"),
        "rms_norm_eps": (content.get("rms_norm_eps"), 1e-6),
        "rope_theta": (rope.get("rope_theta"), 10000.0),
        "attention_bias": (content.get("attention_bias"), False),
        "tie_word_embeddings": (content.get("tie_word_embeddings"), True),
        "embeddings_scale_by_sqrt_dim": (
            content.get("embeddings_scale_by_sqrt_dim"),
            True,
        ),
    }
    for key, (value, expected) in required.items():
        if value is not None and value != expected:
            raise ValueError(f"{key} is {value!r}; only {expected!r} is supported.")
    width, num_heads = content["hidden_size"], content["num_attention_heads"]
    return GriffinConfig(
        vocab_size=content["vocab_size"],
        width=width,
        # transformers halves it: the gate and the linear half.
        mlp_width=content["intermediate_size"] // 2,
        num_layers=content["num_hidden_layers"],
        block_pattern=tuple(
            BLOCK_TYPES.get(kind, kind)
            for kind in content.get("block_types") or [*["recurrent"] * 2, "attention"]
        ),
        num_heads=num_heads,
        num_kv_heads=content.get("num_key_value_heads") or num_heads,
        head_dim=content.get("head_dim") or width // num_heads,
        rope_fraction=rope.get("partial_rotary_factor", 0.5),
        attention_window=content.get("attention_window_size", 2048),
        lru_width=content.get("lru_width") or width,
        num_gate_blocks=num_heads,
        conv_width=content.get("conv1d_width", 4),
        embedding_scale=float(np.sqrt(width).astype(jnp.bfloat16)),
        logits_soft_cap=content.get("logits_soft_cap", 30.0),
    )


def config_to_json(config: GriffinConfig) -> dict[str, Any]:
    """The config.json of transformers for this architecture.

    Raises:
      ValueError: naming the fields in which transformers' RecurrentGemma is fixed.
    """
    stored_types = {native: stored for stored, native in BLOCK_TYPES.items()}
    content = {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": MODEL_TYPE,
        WRITER_KEY: WRITER,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 2 * config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "block_types": [
            stored_types.get(kind, "recurrent") for kind in config.block_pattern
        ],
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.width // config.num_heads,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": config.rope_fraction,
        },
        "attention_window_size": config.attention_window,
        "attention_bias": False,
        "lru_width": config.lru_width,
        "conv1d_width": config.conv_width,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "logits_soft_cap": config.logits_soft_cap or 30.0,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    # What does not survive the way back is what transformers has no setting for.
    fixed = config_from_json(content).to_dict()
    if config.query_scale == config.head_dim**-0.5:
        fixed["query_scale"] = config.query_scale
    differing = [
        f"{name} is {value!r}, must be {fixed[name]!r}"
        for name, value in config.to_dict().items()
        if value != fixed[name]
    ]
    if differing:
        raise ValueError(
            "transformers has no such RecurrentGemma: "
            + "; ".join(differing)
            + ". Save it in the native format."
        )
    return content
