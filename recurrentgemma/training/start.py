"""What a run begins with: architecture, tokenizer, parameters, and another run's state."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from recurrentgemma.checkpoints import load, open_checkpoint, parameter_dtype
from recurrentgemma.checkpoints.hugging_face import MODEL_TYPES
from recurrentgemma.checkpoints.model_types import config_from_json
from recurrentgemma.checkpoints.parameters import (
    check_tokenizer,
    describe,
    named_parameters,
)
from recurrentgemma.checkpoints.stored import CONFIG_FILE
from recurrentgemma.config import PRESETS, GriffinConfig, Runtime, find_preset
from recurrentgemma.griffin import Griffin, stack_layers
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training import options
from recurrentgemma.training.config import TrainConfig
from recurrentgemma.training.selection import trained_names
from recurrentgemma.training.state import Checkpoints, TrainState

BUNDLED_TOKENIZER = Path(__file__).parents[1] / "assets" / "nano" / "tokenizer.model"
DEFAULT_MODEL = "nano"
STATES = "checkpoints"
"""The directory of a run that holds its training states."""


def architecture_of(config: TrainConfig) -> GriffinConfig:
    """The architecture that a run trains; no parameter is read.

    Raises:
      ValueError: there is no such preset, file or checkpoint.
    """
    given = config.model
    if isinstance(given, GriffinConfig):
        return given
    if given is None and config.init_from is not None:
        return open_checkpoint(config.init_from).config
    given = DEFAULT_MODEL if given is None else given
    path = Path(given)
    if given not in PRESETS and path.is_dir():
        if not (path / CONFIG_FILE).exists():
            return open_checkpoint(path).config
        path = path / CONFIG_FILE
    if given not in PRESETS and path.is_file():
        return _read_config(path)
    return find_preset(given)


def _read_config(path: Path) -> GriffinConfig:
    """The architecture in a config.json: ours, transformers', or the fields alone."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (model_type := MODEL_TYPES.get(content.get("model_type"))) is not None:
            return config_from_json(model_type, content)
        return GriffinConfig.from_dict(content.get("config", content))
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model: expected the config of a model in {path}: {error}"
        ) from error


def with_overrides(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """The config with other values of some fields.

    Args:
      config: of a run.
      assignments: such as "optimizer.learning_rate=1e-3", or "model.num_layers=3" for
          a field of the architecture, whatever `model` names.

    Raises:
      ValueError: an assignment names no field, or has a wrong value.
    """
    if any(assignment.startswith("model.") for assignment in assignments):
        config = dataclasses.replace(config, model=architecture_of(config))
    return options.with_overrides(config, assignments)


def tokenizer_of(config: TrainConfig, architecture: GriffinConfig) -> Tokenizer:
    """The tokenizer that is given, else the checkpoint's, else the bundled one.

    Raises:
      ValueError: it does not fit the vocabulary.
    """
    path: Any = config.tokenizer
    if path is None and config.init_from is not None:
        path = open_checkpoint(config.init_from, architecture).stored.tokenizer_path
    tokenizer = Tokenizer(path or BUNDLED_TOKENIZER)
    check_tokenizer(architecture, tokenizer)
    return tokenizer


def first_model(config: TrainConfig, architecture: GriffinConfig) -> Griffin:
    """The model before the first step: parameters are float32, loaded or random."""
    compute = config.compute
    runtime = Runtime(compute_dtype=compute.compute_dtype, remat=compute.remat)
    if config.init_from is None:
        rngs = nnx.Rngs(config.seed)
        model = Griffin(architecture, rngs=rngs, runtime=runtime)
    else:
        model, _ = load(
            config.init_from,
            config=architecture,
            runtime=runtime,
            param_dtype="float32",
        )
    return _prepared(config, model)


def _prepared(config: TrainConfig, model: Griffin) -> Griffin:
    """The model with its adapters, its layers stacked, if the config says so."""
    model = config.adapters.add_to(model, config.seed)
    return stack_layers(model) if config.compute.stack_layers else model


def frozen_in_compute_dtype(
    frozen: dict[str, jax.Array], model: Griffin
) -> dict[str, jax.Array]:
    """Parameters that are not trained, in the dtype that they are computed with."""
    return {
        name: value.astype(parameter_dtype(name, model.config, model.runtime))
        for name, value in frozen.items()
    }


def check(config: TrainConfig, architecture: GriffinConfig) -> None:
    """Refuses what a run could not begin with, before anything is written.

    Raises:
      ValueError: a pattern matches no parameter, or there is no state to branch off.
    """
    described = jax.eval_shape(partial(_prepared, config), describe(architecture))
    trained = config.adapters.trained(config.train_only)
    trained_names(named_parameters(described), trained, config.freeze)
    begun = (Path(config.output) / STATES).exists()
    if config.branch_from is not None and not begun:
        _, step = _branch_point(config.branch_from)
        if step >= config.steps:
            raise ValueError(
                f"steps: expected more than the {step} of {config.branch_from}, got "
                f"{config.steps}"
            )


def branch(run: str, like: TrainState) -> TrainState:
    """A training state of another run.

    Args:
      run: the directory of the run, or DIRECTORY@STEP; without a step, its newest.
      like: a state of the same shapes.

    Raises:
      ValueError: there is no such state, or it is of another model or optimizer.
    """
    states, step = _branch_point(run)
    with contextlib.closing(Checkpoints(states, read_only=True)) as checkpoints:
        return checkpoints.restore(like, step)


def _branch_point(run: str) -> tuple[Path, int]:
    """The directory of a run's states, and the step of one of them."""
    folder, at, text = run.rpartition("@")
    if not at or not text.isdigit():
        folder, text = run, None
    states = Path(folder) / STATES
    if not states.is_dir():
        raise ValueError(
            f"branch_from: expected the directory of a run, got {folder!r}, which has "
            f"no {STATES}"
        )
    with contextlib.closing(Checkpoints(states, read_only=True)) as checkpoints:
        steps = checkpoints.steps
    step = max(steps, default=None) if text is None else int(text)
    if step is None or step not in steps:
        raise ValueError(
            f"branch_from: expected a step that {folder} has a state of, got {step}; "
            f"there are {', '.join(map(str, steps)) or 'none'}"
        )
    return states, step
