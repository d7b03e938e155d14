"""Adapters of low rank (LoRA, arXiv 2106.09685): fine-tuning of few numbers.

    W  ->  W + (alpha / rank) A B,      A [in, rank], B [rank, out]

An adapted parameter holds a `LowRank`, which the layers multiply by wherever they run:
in training, stacked or sharded, in prefill, chunks, decode, speculation and scoring.
A starts random and B at zero, so that an adapted model begins as the model it was made
from. Its arrays are called `....kernel.base`, `....kernel.lora_a`, `....kernel.lora_b`;
the last two are what fine-tuning trains.

    model = add_adapters(model, rank=8, rngs=nnx.Rngs(0))
    ...                                        # train what matches TRAINED
    save_adapters("tuned.safetensors", model)  # adapters alone, for the same base
    save("tuned", merge_adapters(model), tokenizer)  # or whole, in any layout
"""

import fnmatch
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma import _validation as check
from recurrentgemma._atomic import replace_file
from recurrentgemma.checkpoints.parameters import (
    EMBEDDING,
    is_multiplied,
    parameter_values,
    tensors_of,
    with_values,
)
from recurrentgemma.checkpoints.safetensors_file import (
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from recurrentgemma.checkpoints.tensors import place
from recurrentgemma.config import GriffinConfig
from recurrentgemma.generation.model_digest import model_digest
from recurrentgemma.griffin import Griffin, stack_layers, unstack_layers
from recurrentgemma.inspect import with_observer
from recurrentgemma.matrices import LowRank, Matrix

TRAINED = ("*.lora_a", "*.lora_b")
"""Patterns of the arrays that fine-tuning with adapters trains."""
FORMAT = "recurrentgemma adapters"
FORMAT_VERSION = "1"
_ARRAYS = ("lora_a", "lora_b")


def add_adapters(
    model: Griffin,
    patterns: str | Sequence[str] | None = None,
    *,
    rank: int,
    alpha: float | None = None,
    rngs: nnx.Rngs,
) -> Griffin:
    """A model like `model` with adapters on the matrices that the patterns match.

    The new model computes what the old one computes until its adapters are trained.

    Args:
      model: the model, plain or quantised, stacked or not. It stays as it is; other
        parameters are shared.
      patterns: names of matrices in the manner of shells, such as "blocks.*.mlp.*" or
        "embedder.embedding". All layers that are stacked together have one name. None
        chooses every linear layer: neither gates nor the embedding.
      rank: columns of A and rows of B, at least 1.
      alpha: the product A B is multiplied by alpha / rank; None is the rank itself.
      rngs: key of the random A.

    Raises:
      ValueError: a pattern matches no matrix (all names are listed) or one that has an
        adapter, or a number is out of its range.
    """
    check.instance("model", model, Griffin, "a Griffin model")
    check.positive_integer("rank", rank)
    check.instance("rngs", rngs, nnx.Rngs, "nnx.Rngs, such as nnx.Rngs(0)")
    if alpha is not None and not 0 < alpha < math.inf:
        check.refuse("alpha", "a positive number or None", alpha)
    values = parameter_values(model)
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen = _matching(patterns, values, model.config)
    if twice := [name for name in chosen if isinstance(values[name], LowRank)]:
        raise ValueError(
            f"patterns: expected matrices without adapters, got {twice[0]}, which has "
            "one; use merge_adapters first"
        )
    adapted = {
        name: _adapted(name, values[name], rank, (alpha or rank) / rank, rngs)
        for name in chosen
    }
    return with_values(model, adapted)


def merge_adapters(model: Griffin) -> Griffin:
    """The model with W + (alpha / rank) A B in the place of each adapted W.

    All its parameters are arrays, so that `save` writes it in every layout: a quantised
    matrix becomes float32. Rounding apart, it computes what the adapted model does.
    """
    values = parameter_values(model)
    merged = {n: v.materialize() for n, v in values.items() if isinstance(v, Matrix)}
    return with_values(model, merged)


def remove_adapters(model: Griffin) -> Griffin:
    """The model that the adapters were added to."""
    bases = {name: value.base for name, value in _adapted_values(model).items()}
    return with_values(model, bases)


def has_adapters(model: Griffin) -> bool:
    """Whether a parameter of the model has an adapter."""
    return bool(_adapted_values(model))


def save_adapters(path: str | os.PathLike[str], model: Griffin) -> None:
    """Writes the adapters alone, with a digest of the model that they belong to.

    Args:
      path: the file, a safetensors file; an existing one is replaced.
      model: an adapted model; stacked layers are written one by one.

    Raises:
      ValueError: the model has no adapters, or the file cannot be written.
    """
    path = check.path("path", path)
    model = unstack_layers(model)
    adapted = _adapted_values(model)
    if not adapted:
        raise ValueError(
            "model: expected one with adapters, got one without; use add_adapters"
        )
    tensors = tensors_of(model)
    names = [f"{name}.{array}" for name in adapted for array in _ARRAYS]
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base": _base_digest(model),
        "scales": json.dumps({name: value.scale for name, value in adapted.items()}),
    }
    try:
        with replace_file(path) as partial:
            partial.unlink()
            write_safetensors(partial, {n: tensors[n] for n in names}, metadata)
    except OSError as error:
        raise ValueError(
            f"Could not save to {path}: {error.strerror or error}. Nothing was written."
        ) from error


def load_adapters(path: str | os.PathLike[str], model: Griffin) -> Griffin:
    """The model with the adapters of a file of `save_adapters`.

    Args:
      path: the file.
      model: the model that they were trained on, in any dtype, stacked or not.

    Raises:
      ValueError: the file is missing, damaged or no file of adapters; it belongs to
        another base, such as another quantisation or a fine-tuned sibling; or the
        model has adapters already.
    """
    path = check.path("path", path)
    check.instance("model", model, Griffin, "a Griffin model")
    if has_adapters(model):
        raise ValueError(
            "model: expected one without adapters, got an adapted one; use "
            "merge_adapters or remove_adapters first"
        )
    is_stacked = len(model.groups) > 0
    model = unstack_layers(model)
    metadata = read_metadata(path)
    if (metadata.get("format"), metadata.get("format_version")) != (
        FORMAT,
        FORMAT_VERSION,
    ):
        raise ValueError(f"{path} is not a file of adapters that this version reads.")
    if metadata.get("base") != _base_digest(model):
        raise ValueError(
            f"{path} belongs to another model, or to other weights or another "
            "quantisation of it; load the model that the adapters were trained on."
        )
    values = parameter_values(model)
    adapted = {
        name: LowRank(values[name], *arrays)
        for name, arrays in _read(path, metadata, values).items()
    }
    model = with_values(model, adapted)
    return stack_layers(model) if is_stacked else model


def _base_digest(model: Griffin) -> str:
    """Digest of the model without adapters and edits."""
    return model_digest(with_observer(remove_adapters(model), None))


def _read(path, metadata, values):
    """A, B and the factor of each adapter of a file, by the name of its matrix."""
    try:
        scales = {n: float(x) for n, x in json.loads(metadata["scales"]).items()}
        sources = read_safetensors(path)
        found = {name: source.shape for name, source in sources.items()}
        expected = {}
        for name in scales:
            *leading, rows, columns = values[name].shape
            rank = found[f"{name}.lora_a"][-1]
            expected[f"{name}.lora_a"] = (*leading, rows, rank)
            expected[f"{name}.lora_b"] = (*leading, rank, columns)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if found != expected:
        raise ValueError(f"{path} is damaged: its arrays do not fit its adapters.")
    arrays = {n: place(source, source.dtype, None) for n, source in sources.items()}
    return {
        name: (arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"], scale)
        for name, scale in scales.items()
    }


def _adapted(name: str, value: Any, rank: int, scale: float, rngs: nnx.Rngs) -> LowRank:
    *leading, rows, columns = value.shape
    # An embedding is multiplied by one-hot rows: one number of A at a time.
    inputs = 1 if name.endswith(EMBEDDING) else rows
    shape = (*leading, rows, rank)
    return LowRank(
        base=value,
        lora_a=jax.random.normal(rngs.params(), shape) / math.sqrt(inputs),
        lora_b=jnp.zeros((*leading, rank, columns)),
        scale=scale,
    )


def _matching(
    patterns: Sequence[str] | None, values: Mapping[str, Any], config: GriffinConfig
) -> list[str]:
    """The names of matrices that a pattern matches; None is all linear layers."""
    matrices = [name for name in values if is_multiplied(name, config)]
    if patterns is None:
        return [name for name in matrices if _is_linear(name, values[name])]
    for pattern in patterns:
        if not fnmatch.filter(matrices, pattern):
            raise ValueError(
                f"patterns: expected each to match a matrix, got {pattern!r}, which "
                f"matches none of:\n  " + "\n  ".join(matrices)
            )
    return [
        name
        for name in matrices
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _is_linear(name: str, value: Any) -> bool:
    """Whether it is the matrix of a linear layer; a gate's has an axis of blocks."""
    stacked = name.startswith("groups.")
    return len(value.shape) - stacked == 2 and not name.endswith(EMBEDDING)


def _adapted_values(model: Griffin) -> dict[str, LowRank]:
    values = parameter_values(model)
    return {n: value for n, value in values.items() if isinstance(value, LowRank)}
