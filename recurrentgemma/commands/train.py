"""`recurrentgemma train`: trains a preset; a flag for each field of `TrainConfig`."""

import dataclasses
from typing import Any

from absl import flags

from recurrentgemma.commands import UsageError
from recurrentgemma.training.loop import TrainConfig, train
from recurrentgemma.training.options import nested_config, options

USAGE = "--output DIRECTORY [FLAGS]"
DETAILS = (
    "Trains a preset on documents and saves it. The same command resumes a run that was "
    "interrupted."
)


def define_flags(values: flags.FlagValues) -> None:
    for field in options(TrainConfig):
        default = None if field.default is dataclasses.MISSING else field.default
        define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(
            type(default), flags.DEFINE_string
        )
        define(_flag_name(field), default, field.metadata["help"], flag_values=values)


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    if values["output"] is None:
        raise UsageError("--output is required: the directory of the run")
    print(train(_build(TrainConfig, values)))


def _build(config: type, values: dict[str, Any]):
    """The config, and those nested in it, from the flags."""
    given = {}
    for field in dataclasses.fields(config):
        nested = nested_config(field)
        given[field.name] = (
            _build(nested, values) if nested else values[_flag_name(field)]
        )
    return config(**given)


def _flag_name(field: dataclasses.Field) -> str:
    return field.name.replace("_", "-")
