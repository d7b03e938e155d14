"""Gemma 1 and Gemma 2 in transformers: names and orientation of tensors, config.json.

`sliding_window` W of Gemma 2 counts the query's own key: a query sees W - 1 keys besides
it. Both scale embeddings by the square root of the width, which is not rounded, and turn
whole heads by the rotary embedding (Gemma 2 report, arXiv 2408.00118, section 2).
"""

import math
from collections.abc import Mapping
from typing import Any

from recurrentgemma.checkpoints.model_types import (
    ACTIVATION,
    SAME,
    ModelType,
    Names,
    linear_names,
)
from recurrentgemma.config import GriffinConfig

LAYER_TYPES = {
    "sliding_attention": "local_attention",
    "full_attention": "global_attention",
}
STORED_LAYER_TYPES = {native: stored for stored, native in LAYER_TYPES.items()}
TOP_NAMES = {
    "embedder.embedding": ("model.embed_tokens.weight", SAME),
    "final_norm.scale": ("model.norm.weight", SAME),
}
LINEAR_NAMES = linear_names(
    {
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
        "mixer.proj_q": "self_attn.q_proj",
        "mixer.proj_k": "self_attn.k_proj",
        "mixer.proj_v": "self_attn.v_proj",
        "mixer.proj_out": "self_attn.o_proj",
    },
    bias=False,
)
SIZES = ("num_key_value_heads", "head_dim")
SUPPORTED = {"rope_scaling": None, "use_bidirectional_attention": False}
ACTIVATIONS = (ACTIVATION, "gelu", None)
"""Values of `hidden_act`: files of Gemma 1 that say gelu mean its tanh form too."""


def _names(norms: Mapping[str, str]) -> Names:
    layer = {
        f"{ours}.scale": (f"{theirs}.weight", SAME) for ours, theirs in norms.items()
    }
    return Names(TOP_NAMES, {**layer, **LINEAR_NAMES})


def _gemma_fields(content: Mapping[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    width, activation = content["hidden_size"], content.get("hidden_act")
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {activation!r}; expected {ACTIVATION!r}.")
    return {
        "mlp_width": content["intermediate_size"],
        "block_pattern": ("global_attention",),
        "num_kv_heads": content["num_key_value_heads"],
        "head_dim": content["head_dim"],
        "rope_fraction": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
        "lru_width": width,
        "num_gate_blocks": 1,
        "embedding_scale": math.sqrt(width),
    }


def _gemma_settings(config: GriffinConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.mlp_width,
        "head_dim": config.head_dim,
        "hidden_act": ACTIVATION,
    }


def _gemma2_fields(
    content: Mapping[str, Any], rope: Mapping[str, Any]
) -> dict[str, Any]:
    scalar, head_dim = content["query_pre_attn_scalar"], content["head_dim"]
    layer_types = content.get("layer_types") or [*LAYER_TYPES]
    return {
        **_gemma_fields(content, rope),
        "block_pattern": _cycle([LAYER_TYPES.get(kind, kind) for kind in layer_types]),
        "query_scale": None if scalar == head_dim else scalar**-0.5,
        "attention_window": content["sliding_window"] - 1,
        "attention_soft_cap": content.get("attn_logit_softcapping"),
        "logits_soft_cap": content.get("final_logit_softcapping"),
        "post_norms": True,
    }


def _gemma2_settings(config: GriffinConfig) -> dict[str, Any]:
    return {
        **_gemma_settings(config),
        "hidden_activation": ACTIVATION,
        "layer_types": [
            STORED_LAYER_TYPES.get(kind, "full_attention")
            for kind in config.block_types
        ],
        "query_pre_attn_scalar": max(1, round(config.attention_scale**-2)),
        "sliding_window": config.attention_window + 1,
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logits_soft_cap,
    }


def _cycle(layer_types: list[str]) -> tuple[str, ...]:
    """The shortest pattern that gives these types when it is cycled."""
    count = len(layer_types)
    for period in range(1, count):
        if layer_types[period:] == layer_types[: count - period]:
            return tuple(layer_types[:period])
    return tuple(layer_types)


GEMMA = ModelType(
    architecture="GemmaForCausalLM",
    names=_names(
        {
            "temporal_pre_norm": "input_layernorm",
            "channel_pre_norm": "post_attention_layernorm",
        }
    ),
    fields=_gemma_fields,
    settings=_gemma_settings,
    sizes=SIZES,
    supported=SUPPORTED,
)
GEMMA2 = ModelType(
    architecture="Gemma2ForCausalLM",
    names=_names(
        {
            "temporal_pre_norm": "input_layernorm",
            "temporal_post_norm": "post_attention_layernorm",
            "channel_pre_norm": "pre_feedforward_layernorm",
            "channel_post_norm": "post_feedforward_layernorm",
        }
    ),
    fields=_gemma2_fields,
    settings=_gemma2_settings,
    sizes=(*SIZES, "query_pre_attn_scalar", "sliding_window"),
    supported=SUPPORTED,
)
