"""The parameters of a model by name, and what belongs to each name."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recurrentgemma.checkpoints.tensors import TensorSource, array_source
from recurrentgemma.config import PRESETS, GriffinConfig, Runtime
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer

MAX_VOCABULARY_PADDING = 256
"""An embedding may have fewer than this many rows that no token uses."""


def parameter_dtype(name: str, runtime: Runtime, param_dtype: Any = None) -> np.dtype:
    """The dtype that a parameter is loaded in.

    Matrices and the embedding are in the compute dtype, where they are only multiplied;
    norm scales, biases, the convolution and `a_param` enter float32 computation and
    stay float32. An explicit `param_dtype` holds for all.
    """
    if param_dtype is not None:
        return np.dtype(param_dtype)
    *_, module, leaf = name.split(".")
    multiplied = leaf in ("kernel", "embedding") and module != "conv_1d"
    return np.dtype(runtime.dtype if multiplied else jnp.float32)


def named_parameters(model: Griffin) -> dict[str, Any]:
    """The arrays of a model by their native names, such as `final_norm.scale`, in the
    order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {
        # The last key is the variable's own.
        jax.tree_util.keystr(path[:-1], simple=True, separator="."): leaf
        for path, leaf in leaves
    }


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
