"""`recurrentgemma train`: trains a model; a flag for each field of `TrainConfig`."""

import dataclasses
from typing import Any

from absl import flags

from recurrentgemma.commands import UsageError
from recurrentgemma.training.config import TrainConfig, read_record
from recurrentgemma.training.loop import train
from recurrentgemma.training.options import kind_of, nested_config, option_fields
from recurrentgemma.training.start import with_overrides

USAGE = "--output DIRECTORY [FLAGS]"
DETAILS = (
    "Trains a model on documents and saves it: a new one, or one that is loaded "
    "(--init-from). The same command resumes a run that was interrupted."
)
_DEFINE = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    tuple: flags.DEFINE_list,
    str: flags.DEFINE_string,
}


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "config",
        None,
        "train_config.json of another run, whose values hold where no flag is given",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "set",
        [],
        "FIELD=VALUE, such as optimizer.b2=0.95, or model.num_layers=3 for a field of "
        "the architecture; may be repeated",
        flag_values=values,
    )
    for config, field in option_fields(TrainConfig):
        kind, _ = kind_of(config, field)
        # None means that the flag is not given.
        _DEFINE[kind](_flag_name(field), None, help_of(field), flag_values=values)


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    if values["output"] is None:
        raise UsageError("--output is required: the directory of the run")
    recorded = {} if values["config"] is None else read_record(values["config"])
    base = TrainConfig(**{**recorded, "output": values["output"]})
    print(train(with_overrides(_with_flags(base, values), values["set"])))


def help_of(field: dataclasses.Field) -> str:
    """What `--help` says about a field, with its default."""
    text, default = field.metadata["help"], field.default
    if default in (None, (), "", dataclasses.MISSING):
        return text
    return f"{text} (default: {default})"


def _with_flags(config: Any, values: dict[str, Any]) -> Any:
    """The config, and those nested in it, with the values of the flags that are given."""
    given = {}
    for field in dataclasses.fields(config):
        if nested_config(field):
            given[field.name] = _with_flags(getattr(config, field.name), values)
        elif (value := values[_flag_name(field)]) is not None:
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **given)


def _flag_name(field: dataclasses.Field) -> str:
    return field.name.replace("_", "-")
