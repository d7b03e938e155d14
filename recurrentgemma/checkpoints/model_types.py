"""What a model type of transformers consists of: names of tensors, and config.json.

A model type is a `ModelType` and a line in `hugging_face.MODEL_TYPES`. Its functions
translate the settings that differ between models; what all of them share (sizes,
activation, norm epsilon, rotary base, tied output projection) is translated here.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from recurrentgemma.checkpoints.stored import WRITER, WRITER_KEY
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig

ACTIVATION = "gelu_pytorch_tanh"
NORM_EPSILON = 1e-6
ROPE_BASE = 10000.0
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
SUPPORTED = {
    "hidden_activation": ACTIVATION,
    "rms_norm_eps": NORM_EPSILON,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
"""Settings that have one value in all supported models."""
IGNORED = re.compile(r"lm_head\.weight|model\.normalizer|.*\.rotary_emb\.inv_freq")
"""The tied output projection and buffers, which older files hold."""


class Orientation(NamedTuple):
    """How the axes of a tensor change between a file and the model."""

    to_native: Callable[[TensorSource], TensorSource]
    from_native: Callable[[TensorSource], TensorSource]


SAME = Orientation(lambda source: source, lambda source: source)
TRANSPOSED = Orientation(TensorSource.transposed, TensorSource.transposed)


class Names:
    """A translation between native names of tensors and those of transformers.

    Args:
      top: (stored name, orientation) of each tensor outside layers, by native name.
      layer: the same for the tensors of a layer, named within `blocks.{i}` and
        `model.layers.{i}`.
    """

    def __init__(
        self,
        top: Mapping[str, tuple[str, Orientation]],
        layer: Mapping[str, tuple[str, Orientation]],
    ):
        self._top, self._layer = top, layer
        self._native_top, self._native_layer = (
            {stored: (native, turn) for native, (stored, turn) in names.items()}
            for names in (top, layer)
        )

    def to_stored(self, name: str) -> tuple[str, Orientation]:
        """The name in transformers of a native one, and the orientation."""
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            stored, orientation = self._layer.get(match[2], (match[2], SAME))
            return f"model.layers.{match[1]}.{stored}", orientation
        return self._top.get(name, (name, SAME))

    def to_native(self, name: str) -> tuple[str, Orientation]:
        """The native name of a stored one; an unknown name stays as it is."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match and match[2] in self._native_layer:
            native, orientation = self._native_layer[match[2]]
            return f"blocks.{match[1]}.{native}", orientation
        return self._native_top.get(name, (name, SAME))


class ModelType(NamedTuple):
    """A model of transformers."""

    architecture: str
    """Class in transformers."""
    names: Names
    """Names and orientations of the tensors."""
    fields: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    """fields(content, rope): the fields of `GriffinConfig` besides vocab_size, width,
    num_layers and num_heads, from a config.json and its rotary settings."""
    settings: Callable[[GriffinConfig], dict[str, Any]]
    """The settings of config.json besides those that all models share."""
    sizes: tuple[str, ...] = ()
    """Settings, besides `SIZES`, that must be positive integers."""
    supported: Mapping[str, Any] = {}
    """Settings, besides `SUPPORTED`, with the one value that they may have."""
    rope_fraction: bool = False
    """Whether config.json holds the share of a head that the rotary embedding turns."""


def linear_names(
    layers: Mapping[str, str], *, bias: bool
) -> dict[str, tuple[str, Orientation]]:
    """Names of the tensors of linear layers.

    Args:
      layers: the stored name of each layer, by native name.
      bias: whether the layers have biases.
    """
    leaves = [("kernel", "weight", TRANSPOSED)] + [("bias", "bias", SAME)] * bias
    return {
        f"{native}.{leaf}": (f"{stored}.{stored_leaf}", orientation)
        for native, stored in layers.items()
        for leaf, stored_leaf, orientation in leaves
    }


def config_from_json(
    model_type: ModelType, content: Mapping[str, Any]
) -> GriffinConfig:
    """The architecture that a config.json of this model type describes.

    Raises:
      ValueError: it lacks a size, or a setting has a value that is not supported.
    """
    sizes = (*SIZES, *model_type.sizes)
    missing = [key for key in sizes if key not in content]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}.")
    for key in sizes:
        value = content[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}; expected a positive integer.")
    rope = content.get("rope_parameters") or content
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters is {rope!r}; expected an object.")  # noqa: TRY004
    stated = {
        **content,
        "rope_theta": rope.get("rope_theta"),
        "rope_type": rope.get("rope_type"),
    }
    supported = {
        **SUPPORTED,
        "rope_theta": ROPE_BASE,
        "rope_type": "default",
        **model_type.supported,
    }
    for key, expected in supported.items():
        value = stated.get(key)
        if value is not None and value != expected:
            raise ValueError(f"{key} is {value!r}; only {expected!r} is supported.")
    return GriffinConfig(
        vocab_size=content["vocab_size"],
        width=content["hidden_size"],
        num_layers=content["num_hidden_layers"],
        num_heads=content["num_attention_heads"],
        **model_type.fields(content, rope),
    )


def config_to_json(
    model_types: Mapping[str, ModelType], config: GriffinConfig
) -> tuple[str, dict[str, Any]]:
    """The model type that can hold an architecture, and its config.json.

    Raises:
      ValueError: there is none; the message names the closest one and the fields in
        which it differs.
    """
    problems = {}
    for name, model_type in model_types.items():
        content = _settings(name, model_type, config)
        problems[name] = _differences(config, config_from_json(model_type, content))
        if not problems[name]:
            return name, content
    closest = min(problems, key=lambda name: len(problems[name]))
    raise ValueError(
        f"transformers has no such model; the closest is {closest}: "
        + "; ".join(problems[closest])
        + ". Save it in the native format."
    )


def _settings(
    name: str, model_type: ModelType, config: GriffinConfig
) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": ROPE_BASE}
    if model_type.rope_fraction:
        rope["partial_rotary_factor"] = config.rope_fraction
    return {
        "architectures": [model_type.architecture],
        "model_type": name,
        WRITER_KEY: WRITER,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rope_parameters": rope,
        "attention_bias": False,
        "rms_norm_eps": NORM_EPSILON,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **model_type.settings(config),
    }


def _differences(config: GriffinConfig, written: GriffinConfig) -> list[str]:
    """The fields that do not survive the way to config.json and back."""
    fixed = written.to_dict()
    if config.attention_scale == written.attention_scale:
        fixed["query_scale"] = config.query_scale
    if config.block_types == written.block_types:
        fixed["block_pattern"] = list(config.block_pattern)
    return [
        f"{name} is {value!r}, must be {fixed[name]!r}"
        for name, value in config.to_dict().items()
        if value != fixed[name]
    ]
