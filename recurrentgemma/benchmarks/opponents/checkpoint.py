"""One random checkpoint, written in the layout of each opponent.

directory/config.json         the config, as `GriffinConfig.to_dict`
directory/tokens.npy          int32 [batch, length]
directory/official.npz        the official Flax names, joined by "/"
directory/hugging_face/       model.safetensors and config.json
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from recurrentgemma.config import GriffinConfig

NUM_TOKENS = (8, 32768)
FIRST_ORDINARY_TOKEN = 3  # after padding, end and beginning of text
EMBEDDING_SCALE = 0.2
"""Of the usual spread: at 1 a random model with tied embeddings repeats its input."""


def _block(config: GriffinConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of a residual block's parameters."""
    d, f, e, n = config.width, config.mlp_width, config.lru_width, config.num_heads
    names: dict[str, tuple[int, ...]] = {
        "temporal_pre_norm/scale": (d,),
        "channel_pre_norm/scale": (d,),
        "mlp_block/ffw_up/w": (2, d, f),
        "mlp_block/ffw_up/b": (2, 1, 1, f),
        "mlp_block/ffw_down/kernel": (f, d),
        "mlp_block/ffw_down/bias": (d,),
    }
    if kind == "local_attention":
        for name, size in ("q", d), ("k", d // n), ("v", d // n):
            names[f"attention_block/proj_{name}/kernel"] = (d, size)
        names["attention_block/proj_final/kernel"] = (d, d)
        names["attention_block/proj_final/bias"] = (d,)
        return names
    for name, rows, columns in ("x", d, e), ("y", d, e), ("out", e, d):
        names[f"recurrent_block/linear_{name}/kernel"] = (rows, columns)
        names[f"recurrent_block/linear_{name}/bias"] = (columns,)
    names["recurrent_block/conv_1d/w"] = (config.conv_width, e)
    names["recurrent_block/conv_1d/b"] = (e,)
    names["recurrent_block/rg_lru/a_param"] = (e,)
    for gate in "a_gate", "input_gate":
        names[f"recurrent_block/rg_lru/{gate}/w"] = (n, e // n, e // n)
        names[f"recurrent_block/rg_lru/{gate}/b"] = (n, e // n)
    return names


def official_parameters(config: GriffinConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 parameters; nothing is zero, so that a swap would show."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embedder/input_embedding": (config.vocab_size, config.width),
        "final_norm/scale": (config.width,),
    }
    for i, kind in enumerate(config.block_types):
        for name, size in _block(config, kind).items():
            shapes[f"blocks.{i}/{name}"] = size

    def draw(name: str, size: tuple[int, ...]) -> np.ndarray:
        if name.endswith("a_param"):  # a ** 8 uniform in area on [0.9, 0.999]
            radius = np.sqrt(rng.uniform(0.9**2, 0.999**2, size))
            return np.log(np.expm1(-np.log(radius))).astype(np.float32)
        if name == "embedder/input_embedding":
            scale = EMBEDDING_SCALE * config.width**-0.5
        else:
            kernel = name.endswith(("kernel", "/w"))
            scale = size[-2] ** -0.5 if kernel else 0.1
        return rng.standard_normal(size, np.float32) * np.float32(scale)

    return {name: draw(name, size) for name, size in shapes.items()}


def hugging_face_parameters(official: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same values under transformers' names, linear weights as [out, in]."""
    words = {
        "input_embedding": "weight",
        "embedder": "model.embed_tokens",
        "final_norm": "model.final_norm",
        "scale": "weight",
        "kernel": "weight",
        "recurrent_block": "temporal_block",
        "attention_block": "temporal_block",
        "proj_q": "q_proj",
        "proj_k": "k_proj",
        "proj_v": "v_proj",
        "proj_final": "o_proj",
        "ffw_down": "down_proj",
    }
    result = {}
    for name, value in official.items():
        parts = name.replace("blocks.", "model.layers.").split("/")
        target = ".".join(words.get(part, part) for part in parts)
        if "ffw_up" in name:
            leaf = {"w": "weight", "b": "bias"}[parts[-1]]
            for half, projection in zip(value, ("gate_proj", "up_proj")):
                prefix = target.replace("ffw_up", projection)
                half = half.T if leaf == "weight" else half.reshape(-1)
                result[prefix[: -len(parts[-1])] + leaf] = half
        elif "rg_lru" in name:
            for old, new in (
                ("a_param", "recurrent_param"),
                ("a_gate.", "recurrent_gate."),
                ("gate.w", "gate_weight"),
                ("gate.b", "gate_bias"),
            ):
                target = target.replace(old, new)
            result[target] = value
        elif "conv_1d" in name:
            weight = parts[-1] == "w"
            target = target[:-1] + ("weight" if weight else "bias")
            result[target] = value.T[:, None, :] if weight else value
        else:
            result[target] = value.T if name.endswith("kernel") else value
    return {name: np.ascontiguousarray(value) for name, value in result.items()}


def hugging_face_config(config: GriffinConfig) -> dict:
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 2 * config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "head_dim": config.width // config.num_heads,
        "lru_width": config.lru_width,
        "attention_window_size": config.attention_window,
        "conv1d_width": config.conv_width,
        "logits_soft_cap": config.logits_soft_cap,
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
    }


def write(directory: Path, config: GriffinConfig, seed: int = 0) -> None:
    """Writes weights and tokens for every opponent.

    Args:
      directory: Exists and is empty.
      config: A model that all opponents can be: RecurrentGemma's blocks R R A with a
        gate block a head, the embedding scaled by the bfloat16-rounded square root.
      seed: Of the random numbers.
    """
    folder = directory / "hugging_face"
    folder.mkdir()
    official = official_parameters(config, seed)
    np.savez(directory / "official.npz", allow_pickle=False, **official)
    tensors = hugging_face_parameters(official)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config)))
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    rng = np.random.default_rng(seed + 1)
    tokens = rng.integers(FIRST_ORDINARY_TOKEN, config.vocab_size, NUM_TOKENS)
    np.save(directory / "tokens.npy", tokens.astype(np.int32))
