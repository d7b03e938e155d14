"""RecurrentGemma in transformers: names and orientation of tensors, and config.json.

`attention_window_size` W of a checkpoint is taken as the window of the trained model,
in which a query sees W keys besides its own; transformers shows it W - 1 of them, so
the two agree for up to W tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from recurrentgemma.checkpoints.model_types import (
    ACTIVATION,
    SAME,
    ModelType,
    Names,
    Orientation,
    linear_names,
)
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig

BLOCK_TYPES = {"recurrent": "recurrent", "attention": "local_attention"}
STORED_BLOCK_TYPES = {native: stored for stored, native in BLOCK_TYPES.items()}


def _from_conv(source: TensorSource) -> TensorSource:
    if len(source.shape) != 3:
        return source  # The comparison with the config reports its shape.
    channels, _, taps = source.shape
    return source.reshaped((channels, taps), axis=0).transposed()


def _to_conv(source: TensorSource) -> TensorSource:
    taps, channels = source.shape
    turned = source.transposed()
    return turned.reshaped((channels, 1, taps), axis=2 * turned.axis)


CONVOLUTION = Orientation(_from_conv, _to_conv)
"""[E, 1, taps] and [taps, E]; the last tap is the current token in both."""

NAMES = Names(
    top={
        "embedder.embedding": ("model.embed_tokens.weight", SAME),
        "final_norm.scale": ("model.final_norm.weight", SAME),
    },
    layer={
        "temporal_pre_norm.scale": ("temporal_pre_norm.weight", SAME),
        "channel_pre_norm.scale": ("channel_pre_norm.weight", SAME),
        "mixer.conv_1d.kernel": ("temporal_block.conv_1d.weight", CONVOLUTION),
        "mixer.conv_1d.bias": ("temporal_block.conv_1d.bias", SAME),
        **linear_names(
            {
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
            },
            bias=True,
        ),
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
    },
)


def _fields(content: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    width, num_heads = content["hidden_size"], content["num_attention_heads"]
    block_types = content.get("block_types") or [*["recurrent"] * 2, "attention"]
    return {
        # transformers halves it: the gate and the linear half.
        "mlp_width": content["intermediate_size"] // 2,
        "block_pattern": tuple(BLOCK_TYPES.get(kind, kind) for kind in block_types),
        "num_kv_heads": content.get("num_key_value_heads") or num_heads,
        "head_dim": content.get("head_dim") or width // num_heads,
        "rope_fraction": rope.get("partial_rotary_factor", 0.5),
        "attention_window": content.get("attention_window_size", 2048),
        "lru_width": content.get("lru_width") or width,
        "num_gate_blocks": num_heads,
        "conv_width": content.get("conv1d_width", 4),
        "embedding_scale": float(np.sqrt(width).astype(jnp.bfloat16)),
        "logits_soft_cap": content.get("logits_soft_cap", 30.0),
    }


def _settings(config: GriffinConfig) -> dict[str, Any]:
    return {
        "intermediate_size": 2 * config.mlp_width,
        "block_types": [
            STORED_BLOCK_TYPES.get(kind, "recurrent") for kind in config.block_pattern
        ],
        "head_dim": config.width // config.num_heads,
        "attention_window_size": config.attention_window,
        "lru_width": config.lru_width,
        "conv1d_width": config.conv_width,
        "hidden_activation": ACTIVATION,
        "logits_soft_cap": config.logits_soft_cap or 30.0,
    }


RECURRENT_GEMMA = ModelType(
    architecture="RecurrentGemmaForCausalLM",
    names=NAMES,
    fields=_fields,
    settings=_settings,
    supported={"embeddings_scale_by_sqrt_dim": True},
    rope_fraction=True,
)
