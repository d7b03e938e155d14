"""`load`: from a checkpoint directory to a model."""

import difflib
import functools
import importlib.resources
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from recurrentgemma import _validation as check
from recurrentgemma.checkpoints import official_pytorch
from recurrentgemma.checkpoints.checksums import check_blobs, checked_before
from recurrentgemma.checkpoints.formats import FORMATS, detect_format
from recurrentgemma.checkpoints.hub import download
from recurrentgemma.checkpoints.official import config_from_shapes
from recurrentgemma.checkpoints.parameters import (
    check_tokenizer,
    describe,
    named_parameters,
    parameter_dtype,
    with_values,
)
from recurrentgemma.checkpoints.quantization import (
    SCHEMES,
    place_quantized,
    place_stored,
    quantizable,
    stored_quantized,
    stored_shapes,
)
from recurrentgemma.checkpoints.shardings import Sharding, shardings_by_name
from recurrentgemma.checkpoints.stored import Stored
from recurrentgemma.checkpoints.tensors import floating_dtype, is_finite, place
from recurrentgemma.config import PRESETS, GriffinConfig, Runtime
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer


def load(
    path_or_preset: str | os.PathLike[str],
    *,
    config: GriffinConfig | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | bytes | None = None,
    runtime: Runtime | None = None,
    param_dtype: Any = None,
    sharding: Sharding | None = None,
    quantize: str | None = None,
) -> tuple[Griffin, Tokenizer | None]:
    """The model and the tokenizer of a checkpoint, whatever its layout.

    Example::

      model, tokenizer = load("nano")

    Args:
      path_or_preset: the directory of a checkpoint; the .pt file of an official one;
        the name of a bundled one (which wins over a directory: write "./nano" for
        that); or a name to download, hf://ORG/NAME (ORG/NAME will do where there is no
        such directory) or kaggle://OWNER/MODEL/FRAMEWORK/VARIATION.
      config: the architecture, instead of the one that the checkpoint states. Released
        official checkpoints state none: shapes that equal a preset's mean that preset.
      tokenizer: the tokenizer, its path or its bytes, instead of the checkpoint's own.
      runtime: how the model is to run.
      param_dtype: the dtype of all parameters (bfloat16, float16, float32; float64 if
        JAX has it enabled); None is what inference needs, see `parameter_dtype`.
        Training needs float32.
      sharding: devices of the parameters: one sharding for all, a function of a
        parameter's name and shape, or shardings by name (nested or joined by dots), all
        of one mesh or one device. None is the default device.
      quantize: "int8" turns the matrices of linear layers and the embedding into int8
        while they are read, with a float32 scale for each output channel or token; the
        model is never in memory in floating point. None keeps what is stored, which
        may be quantised already.

    Returns:
      The model, and the tokenizer or None.

    Raises:
      ValueError: there is no such checkpoint or bundled model; it is damaged (what is
        seen of that says `recurrentgemma.checkpoints`); its
        tensors do not fit the config (all of them are listed); the tokenizer does not
        fit the vocabulary; or nothing could run with these shardings.
    """
    for name, value, kind in (
        ("config", config, GriffinConfig),
        ("runtime", runtime, Runtime),
    ):
        if value is not None:
            check.instance(name, value, kind, f"a {kind.__name__} or None")
    param_dtype = _checked_dtype(param_dtype)
    if quantize is not None:
        check.choice("quantize", quantize, SCHEMES)
    checkpoint = open_checkpoint(path_or_preset, config)
    config, stored = checkpoint.config, checkpoint.stored
    tokenizer = choose_tokenizer(tokenizer, stored)
    runtime = runtime or Runtime()
    check_tokenizer(config, tokenizer)
    described = describe(config, runtime)
    shapes = {name: leaf.shape for name, leaf in named_parameters(described).items()}
    already = stored_quantized(stored.tensors)
    check_tensors(checkpoint, stored_shapes(shapes, already))
    shardings = shardings_by_name(sharding, shapes)
    chosen = set() if quantize is None else quantizable(shapes, config) - already
    parameters, not_finite = {}, set()
    # The largest first: what one needs besides its own memory then adds to little.
    for name in sorted(shapes, key=lambda name: -np.prod(shapes[name])):
        if name in already:
            parameters[name] = place_stored(name, stored.tensors, shardings[name])
            continue
        source = stored.tensors[name].watched(_note_if_not_finite(name, not_finite))
        if name in chosen:
            parameters[name] = place_quantized(name, source, shardings[name])
            continue
        dtype = parameter_dtype(name, config, runtime, param_dtype)
        parameters[name] = place(source.astype(dtype, name), dtype, shardings[name])
    if not_finite:
        logging.warning(
            "%s holds values that are not finite, in %s.",
            checkpoint.path,
            ", ".join(sorted(not_finite)),
        )
    return with_values(described, parameters), tokenizer


def _checked_dtype(param_dtype: Any) -> np.dtype | None:
    if param_dtype is None:
        return None
    dtype = floating_dtype(param_dtype, "param_dtype")
    enabled = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    if dtype == np.float64 and not enabled:
        raise ValueError(
            "param_dtype: expected float32 or smaller, got float64, which JAX turns "
            "into float32; enable jax_enable_x64 to use it."
        )
    return dtype


def _note_if_not_finite(
    name: str, not_finite: set[str]
) -> Callable[[int, np.ndarray], None]:
    def see(start: int, part: np.ndarray) -> None:
        if not is_finite(part):
            not_finite.add(name)

    return see


def choose_tokenizer(
    given: Tokenizer | str | os.PathLike[str] | bytes | None, stored: Stored
) -> Tokenizer | None:
    """The tokenizer that is given, or else the checkpoint's own."""
    chosen = given if given is not None else stored.tokenizer_path
    if chosen is None or isinstance(chosen, Tokenizer):
        return chosen
    if not isinstance(chosen, bytes):
        check.path("tokenizer", chosen)
    return Tokenizer(chosen)


class Checkpoint(NamedTuple):
    """A checkpoint whose tensors have not been read yet, nor compared with a config."""

    path: Path
    layout: str
    """A name in `FORMATS`."""
    stored: Stored
    config: GriffinConfig


def open_checkpoint(
    path_or_preset: str | os.PathLike[str], config: GriffinConfig | None = None
) -> Checkpoint:
    """A checkpoint with the config that is given, that it states or that its shapes
    tell.

    Args:
      path_or_preset: as for `load`.
      config: as for `load`.

    Raises:
      ValueError: there is no such checkpoint, it is damaged, or nothing tells its
        config.
    """
    path = find_checkpoint(path_or_preset)
    layout = detect_format(path)
    stored = FORMATS[layout].read(path)
    # When the first tensor is read: what reads none takes no time.
    check_files = functools.cache(lambda: check_blobs(stored.files))
    tensors = {
        name: checked_before(source, check_files)
        for name, source in stored.tensors.items()
    }
    stored = stored._replace(tensors=tensors)
    config = config or stored.config or config_from_shapes(path, stored.tensors)
    return Checkpoint(path, layout, stored, config)


def read_config(path_or_preset: str | os.PathLike[str]) -> GriffinConfig:
    """The architecture of a checkpoint, whose tensors are not read.

    Args:
      path_or_preset: as for `load`.

    Raises:
      ValueError: as for `load`.
    """
    return open_checkpoint(path_or_preset).config


def find_checkpoint(path_or_preset: str | os.PathLike[str]) -> Path:
    """The directory or file of a checkpoint, of the bundled one of this name, or of
    one that is downloaded.

    Raises:
      ValueError: there is none.
    """
    check.path("path_or_preset", path_or_preset)
    name = os.fspath(path_or_preset)
    bundled = _bundled()
    if name in bundled:
        return bundled[name]
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix in official_pytorch.SUFFIXES):
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; expected the directory of a checkpoint.")
    if name in PRESETS:
        raise ValueError(
            f"No weights of {name!r} are bundled (only of {', '.join(bundled)}): pass "
            "the directory of a downloaded checkpoint, or make a random model with "
            f"Griffin(PRESETS[{name!r}], rngs=nnx.Rngs(0))."
        )
    downloaded = download(name)
    if downloaded is not None:
        return downloaded
    close = difflib.get_close_matches(name, {*bundled, *PRESETS})
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    raise ValueError(f"There is no directory and no preset {name!r}.{hint}")


def _bundled() -> dict[str, Path]:
    assets = Path(str(importlib.resources.files("recurrentgemma"))) / "assets"
    return {file.parent.name: file.parent for file in assets.glob("*/config.json")}


def check_tensors(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError unless these are the names and shapes of its tensors; it lists
    all that differ."""
    path, _, stored, config = checkpoint

    def named(name: str) -> str:
        other = stored.stored_name(name)
        return name if other == name else f"{name} ({other})"

    found = stored.tensors
    problems = [
        *(f"missing: {named(name)}" for name in shapes if name not in found),
        *(f"unexpected: {name}" for name in found if name not in shapes),
        *(
            f"wrong shape: {named(name)} is {list(found[name].shape)}, expected "
            f"{list(shape)}"
            for name, shape in shapes.items()
            if name in found and found[name].shape != shape
        ),
    ]
    if not problems:
        return
    theirs = (stored.config or config).to_dict()
    problems += [
        f"config= says {name} is {value!r}, the checkpoint {theirs[name]!r}"
        for name, value in config.to_dict().items()
        if value != theirs[name]
    ]
    raise ValueError(
        f"The tensors of {path} do not fit its config:\n  " + "\n  ".join(problems)
    )
