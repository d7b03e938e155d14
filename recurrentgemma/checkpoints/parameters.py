"""The parameters of a model by name, and what belongs to each name."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.checkpoints.tensors import TensorSource, array_source
from recurrentgemma.config import PRESETS, GriffinConfig, Runtime
from recurrentgemma.griffin import Griffin
from recurrentgemma.matrices import is_matrix
from recurrentgemma.tokenizer import Tokenizer

MAX_VOCABULARY_PADDING = 256
"""An embedding may have fewer than this many rows that no token uses."""

EMBEDDING = "embedding"
"""Name of the embedding inside its module."""
INNER_DTYPES = {
    "lora_a": np.float32,
    "lora_b": np.float32,
    "values": np.int8,
    "scales": np.float32,
}
"""Dtypes of the arrays of an adapted or quantised matrix, besides an adapter's base."""


def parameter_dtype(
    name: str, config: GriffinConfig, runtime: Runtime, param_dtype: Any = None
) -> np.dtype:
    """The dtype that a parameter is loaded in.

    Matrices and the embedding are in the compute dtype, where they are only multiplied;
    norm scales, biases and what a mixer's class names enter float32 computation and stay
    float32. An explicit `param_dtype` holds for all of these. The matrices of an adapter
    are float32, a quantised matrix is int8 with float32 scales.

    Args:
      name: native, such as "blocks.0.mixer.linear_x.kernel".
      config: of the model.
      runtime: how the model is to run.
      param_dtype: the dtype of all parameters; None is what inference needs.
    """
    # What an adapter was put on keeps its dtype.
    name = re.sub(r"\.base\b", "", name)
    inner = name.rpartition(".")[2]
    if inner in INNER_DTYPES:
        return np.dtype(INNER_DTYPES[inner])
    if param_dtype is not None:
        return np.dtype(param_dtype)
    return np.dtype(runtime.dtype if is_multiplied(name, config) else jnp.float32)


def is_multiplied(name: str, config: GriffinConfig) -> bool:
    """Whether a parameter, by its native name, is a matrix that is only multiplied."""
    mixer, inner = mixer_of(name, config)
    if mixer is not None:
        return mixer.is_multiplied(inner)
    return name.split(".")[-1] in ("kernel", EMBEDDING)


def mixer_of(name: str, config: GriffinConfig) -> tuple[Any, str]:
    """The class of the mixer that a parameter belongs to, and its name inside it.

    None and the whole name for a parameter of something else.
    """
    match = re.fullmatch(r"(blocks|groups)\.(\d+)\.mixer\.(.+)", name)
    if match is None:
        return None, name
    # Layers repeat with the pattern, whose places are the groups of a stacked model;
    # the layers behind whole groups begin with the pattern again.
    kind = config.block_pattern[int(match[2]) % len(config.block_pattern)]
    return TEMPORAL_MIXERS[kind], match[3]


def parameter_values(model: Griffin) -> dict[str, Any]:
    """What the parameters of a model hold, by their native names, such as
    `final_norm.scale`: arrays, or a `Matrix` such as an adapted one."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_matrix)
    return {
        # The last key is the variable's own.
        jax.tree_util.keystr(path[:-1], simple=True, separator="."): leaf
        for path, leaf in leaves
    }


def with_values(model: Griffin, values: Mapping[str, Any]) -> Griffin:
    """A model like `model` whose parameters hold these values.

    Args:
      model: the model, which stays as it is.
      values: by native name, as `parameter_values` gives them; what is missing stays.
    """
    structure = jax.tree.structure(model, is_leaf=is_matrix)
    return structure.unflatten(
        values.get(name, value) for name, value in parameter_values(model).items()
    )


def named_parameters(model: Griffin) -> dict[str, Any]:
    """The arrays of a model by their native names, in the order of `jax.tree.leaves`.

    Those of a `Matrix` have names inside the parameter's, such as
    `blocks.0.mixer.linear_x.kernel.lora_a`.
    """
    arrays = {}
    for name, value in parameter_values(model).items():
        if not is_matrix(value):
            arrays[name] = value
            continue
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            inner = jax.tree_util.keystr(path, simple=True, separator=".")
            arrays[f"{name}.{inner}"] = leaf
    return arrays


def describe(config: GriffinConfig, runtime: Runtime = Runtime()) -> Griffin:
    """The model with shapes for parameters; nothing is allocated."""
    return nnx.eval_shape(lambda: Griffin(config, rngs=nnx.Rngs(0), runtime=runtime))


def parameter_shapes(config: GriffinConfig) -> dict[str, tuple[int, ...]]:
    """Shapes by native name."""
    parameters = named_parameters(describe(config))
    return {name: leaf.shape for name, leaf in parameters.items()}


def presets_of(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The presets whose parameters have these native names and shapes."""
    embedding = shapes.get("embedder.embedding")
    return [
        name
        for name, preset in PRESETS.items()
        if (preset.vocab_size, preset.width) == embedding
        and parameter_shapes(preset) == shapes
    ]


def tensors_of(model: Griffin) -> dict[str, TensorSource]:
    """A source for each native name; stacked layers are taken apart."""
    period = len(model.groups)
    tensors = {}
    for name, array in named_parameters(model).items():
        if match := re.fullmatch(r"groups\.(\d+)\.(.+)", name):
            for group in range(len(array)):
                layer = group * period + int(match[1])
                source = array_source(array, group)
                tensors[f"blocks.{layer}.{match[2]}"] = source
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            layer = int(match[1]) + model.config.num_layers - len(model.blocks)
            tensors[f"blocks.{layer}.{match[2]}"] = array_source(array)
        else:
            tensors[name] = array_source(array)
    return tensors


def check_tokenizer(config: GriffinConfig, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError unless the tokenizer, if any, fits the vocabulary."""
    if tokenizer is None:
        return
    unused = config.vocab_size - tokenizer.vocab_size
    if not 0 <= unused < MAX_VOCABULARY_PADDING:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} pieces but the model's "
            f"vocabulary has {config.vocab_size}: they do not belong together."
        )
