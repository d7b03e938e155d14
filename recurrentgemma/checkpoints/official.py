"""What the released Flax and PyTorch checkpoints share: names, and no config.

The names here are those of Flax joined by dots. `ffw_up` holds two matrices of the MLP,
[2, D, F]: the gate, then the other. Its bias is [2, 1, 1, F].
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import logging

from recurrentgemma.checkpoints.parameters import presets_of
from recurrentgemma.checkpoints.stored import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    WRITER,
    WRITER_KEY,
    Stored,
    config_of,
    find_tokenizer,
    read_config_json,
    write_json,
    write_tokenizer,
)
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import PRESETS, GriffinConfig
from recurrentgemma.tokenizer import Tokenizer

FUSED = "mlp_block.ffw_up"
HALVES = ("gate", "up")
FUSED_LEAVES = {"kernel": "w", "bias": "b"}
NAMES = {
    "embedder.embedding": "embedder.input_embedding",
    **{f"mlp.down.{leaf}": f"mlp_block.ffw_down.{leaf}" for leaf in ("kernel", "bias")},
    **{
        f"mixer.{layer}.{leaf}": f"recurrent_block.{layer}.{leaf}"
        for layer in ("linear_x", "linear_y", "linear_out")
        for leaf in ("kernel", "bias")
    },
    "mixer.conv_1d.kernel": "recurrent_block.conv_1d.w",
    "mixer.conv_1d.bias": "recurrent_block.conv_1d.b",
    "mixer.rg_lru.a_param": "recurrent_block.rg_lru.a_param",
    "mixer.rg_lru.recurrence_gate.kernel": "recurrent_block.rg_lru.a_gate.w",
    "mixer.rg_lru.recurrence_gate.bias": "recurrent_block.rg_lru.a_gate.b",
    "mixer.rg_lru.input_gate.kernel": "recurrent_block.rg_lru.input_gate.w",
    "mixer.rg_lru.input_gate.bias": "recurrent_block.rg_lru.input_gate.b",
    **{
        f"mixer.{layer}.kernel": f"attention_block.{layer}.kernel"
        for layer in ("proj_q", "proj_k", "proj_v")
    },
    "mixer.proj_out.kernel": "attention_block.proj_final.kernel",
    "mixer.proj_out.bias": "attention_block.proj_final.bias",
}
NATIVE_NAMES = {theirs: ours for ours, theirs in NAMES.items()}
MIXERS = {"rg_lru": "recurrent", "proj_q": "local_attention"}
"""Block types by a part that no other has."""


def _split(name: str) -> tuple[str, str]:
    """The prefix of a layer, or none, and the rest of the name."""
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+)", name, re.DOTALL)
    return (match[1] or "", match[2]) if match else ("", name)


def to_stored_name(name: str) -> str:
    """The official name of a native one; `[0]` and `[1]` are parts of a tensor."""
    layer, rest = _split(name)
    if match := re.fullmatch(r"mlp\.(gate|up)\.(kernel|bias)", rest):
        half = HALVES.index(match[1])
        return f"{layer}{FUSED}.{FUSED_LEAVES[match[2]]}[{half}]"
    return layer + NAMES.get(rest, rest)


def to_native(tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Native names and shapes for official ones; unknown tensors stay as they are."""
    native = {}
    for name, source in tensors.items():
        layer, rest = _split(name)
        if rest == f"{FUSED}.b" and source.shape[:3] == (2, 1, 1):
            source = source.reshaped((2, source.shape[-1]), axis=1)
        fits = len(source.shape) > 1 and source.shape[0] == 2
        for leaf, stored in FUSED_LEAVES.items():
            if rest == f"{FUSED}.{stored}" and fits:
                for index, half in enumerate(HALVES):
                    native[f"{layer}mlp.{half}.{leaf}"] = source.entry(index)
                break
        else:
            native[layer + NATIVE_NAMES.get(rest, rest)] = source
    return native


def from_native(tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Official names and shapes for native ones.

    Raises:
      ValueError: tensors that are stored as one differ in dtype.
    """
    official = {}
    for name, gate in tensors.items():
        match = re.fullmatch(r"(blocks\.\d+\.)mlp\.(gate|up)\.(kernel|bias)", name)
        if not match:
            official[to_stored_name(name)] = gate
        elif match[2] == "gate":
            up = tensors[f"{match[1]}mlp.up.{match[3]}"]
            if up.dtype != gate.dtype:
                raise ValueError(
                    f"{name} is {gate.dtype} and the tensor that the official layouts "
                    f"store with it {up.dtype}: give both one dtype."
                )
            both = gate.stacked(up)
            if match[3] == "bias":
                both = both.reshaped((2, 1, 1, *gate.shape), axis=3)
            official[f"{match[1]}{FUSED}.{FUSED_LEAVES[match[3]]}"] = both
    return official


def slicing_axis(name: str, shape: Sequence[int], chunk: Sequence[int] = ()) -> int:
    """The axis along which to read a stored tensor: never the first of a fused one.

    Args:
      name: the official name.
      shape: its shape.
      chunk: the shape of its separately stored parts, if it has any.
    """
    axes = range(1 if f".{FUSED}." in name and len(shape) > 1 else 0, len(shape))
    parted = [i for i in axes if chunk and chunk[i] < shape[i]]
    long = [i for i in axes if shape[i] > 1]
    return next(iter([*parted, *long, *axes]), 0)


def check_config(config: GriffinConfig) -> None:
    """Raises ValueError unless the official package has such a model, naming why."""
    types = set(config.block_types)
    fixed: dict[str, tuple] = {"mlp_bias": (True,), "post_norms": (False,)}
    fixed["embedding_scale"] = (1.0, float(np.sqrt(config.width).astype(jnp.bfloat16)))
    fixed["mlp_width"] = (config.mlp_width or "positive",)
    if "recurrent" in types:
        fixed |= {"conv_width": (4,), "complex_rg_lru": (False,)}
    if "local_attention" in types:
        fixed |= {
            "num_kv_heads": (1,),
            "head_dim": (config.width // config.num_heads,),
            "query_scale": (None, config.head_dim**-0.5),
            "rope_fraction": (0.5,),
            "attention_soft_cap": (None,),
            "attention_bias": (True,),
        }
    if {"recurrent", "local_attention"} <= types:
        fixed["num_gate_blocks"] = (config.num_heads,)
    differing = [
        f"{name} is {getattr(config, name)!r}, must be "
        + " or ".join(repr(value) for value in values)
        for name, values in fixed.items()
        if getattr(config, name) not in values
    ]
    differing += [
        f"{kind} in block_pattern"
        for kind in sorted(types - {"recurrent", "local_attention"})
    ]
    if differing:
        raise ValueError(
            "The official package has no such model: "
            + "; ".join(differing)
            + ". Save it in the native format."
        )


def write_other_files(
    path: Path,
    config: GriffinConfig,
    tensors: Mapping[str, TensorSource],
    tokenizer: Tokenizer | None,
) -> dict[str, TensorSource]:
    """Writes all but the tensors into an empty directory.

    The config lies beside the checkpoint, where official readers do not look.

    Returns:
      The tensors by official name, to be written.

    Raises:
      ValueError: the official package has no such model.
    """
    check_config(config)
    official = from_native(tensors)
    write_json(path / CONFIG_FILE, {WRITER_KEY: WRITER, "config": config.to_dict()})
    write_tokenizer(path, tokenizer)
    return official


def with_other_files(
    path: Path,
    tensors: Mapping[str, TensorSource],
    files: Iterable[Path],
    stored_name: Callable[[str], str] = to_stored_name,
) -> Stored:
    """The checkpoint of tensors by official name, and of what the directory holds
    besides: perhaps the config, and perhaps the tokenizer, which may also lie beside
    the directory, as released.

    Raises:
      ValueError: the config is not valid.
    """
    content = read_config_json(path) or {}
    beside = path.parent / TOKENIZER_FILE
    tokenizer = find_tokenizer(path) or (beside if beside.is_file() else None)
    return Stored(
        config=config_of(path, content) if "config" in content else None,
        tensors=to_native(tensors),
        tokenizer_path=tokenizer,
        stored_name=stored_name,
        files={*files, path / CONFIG_FILE, *([] if tokenizer is None else [tokenizer])},
    )


def config_from_shapes(
    path: Path, tensors: Mapping[str, TensorSource]
) -> GriffinConfig:
    """The preset whose tensors have these names and shapes.

    Args:
      path: the checkpoint, for messages.
      tensors: by native name.

    Raises:
      ValueError: there is none; it says what shapes tell and what they do not. Or the
        tensors are of something else.
    """
    shapes = {name: source.shape for name, source in tensors.items()}
    told = _fields_from_shapes(shapes)
    if not told["num_layers"] or "width" not in told:
        names = [*tensors][:3] + ["..."] * (len(tensors) > 3)
        raise ValueError(
            f"{path} holds no model of the official package: an embedding and layers "
            f"are not among its {len(tensors)} tensors ({', '.join(names)})."
        )
    for name in presets_of(shapes):
        try:
            check_config(PRESETS[name])
        except ValueError:
            continue
        logging.info("%s stores no config; it has the shapes of %s.", path, name)
        return PRESETS[name]
    types = told["block_pattern"]
    untold = ["embedding_scale", "logits_soft_cap"]
    if "local_attention" in types:
        untold.append("attention_window")
    if "recurrent" not in types:
        untold += ["num_heads", "head_dim"]
    raise ValueError(
        f"{path} stores no config, and its tensors have the shapes of no preset: pass "
        "config=. The shapes tell "
        + ", ".join(f"{name}={value!r}" for name, value in told.items())
        + f"; they do not tell {', '.join(untold)}."
    )


def _fields_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """The fields of a config that tensors of these native names and shapes tell."""
    found = {}
    for name, shape in shapes.items():
        rest = _split(name)[1]
        if rest == "embedder.embedding" and len(shape) == 2:
            found["vocab_size"], found["width"] = shape
        elif rest == "mlp.down.kernel" and len(shape) == 2:
            found["mlp_width"] = shape[0]
        elif rest == "mixer.rg_lru.recurrence_gate.bias" and len(shape) == 2:
            found["lru_width"] = shape[0] * shape[1]
            # The official package has one number for both.
            found["num_gate_blocks"] = found["num_heads"] = shape[0]
    layers: dict[int, str] = {}
    for name in shapes:
        if match := re.fullmatch(r"blocks\.(\d+)\.mixer\.(rg_lru|proj_q)\..+", name):
            layers[int(match[1])] = MIXERS[match[2]]
    found["num_layers"] = len(layers)
    found["block_pattern"] = tuple(layers[i] for i in sorted(layers))
    if "num_heads" in found and "width" in found:
        found["head_dim"] = found["width"] // found["num_heads"]
    return found
