"""`recurrentgemma train`: trains a preset; a flag for each field of `TrainConfig`."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

from absl import flags

from recurrentgemma.commands import UsageError
from recurrentgemma.training.loop import TrainConfig, train

USAGE = "--output DIRECTORY [FLAGS]"
DETAILS = (
    "Trains a preset on documents and saves it. The same command resumes a run that was "
    "interrupted."
)


def define_flags(values: flags.FlagValues) -> None:
    for config, field in _fields(TrainConfig):
        default = None if field.default is dataclasses.MISSING else field.default
        define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(
            type(default), flags.DEFINE_string
        )
        doc = _field_docs(config).get(field.name, field.name.replace("_", " "))
        define(_flag_name(field), default, doc, flag_values=values)


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
        nested = _nested(field)
        given[field.name] = (
            _build(nested, values) if nested else values[_flag_name(field)]
        )
    return config(**given)


def _fields(config: type) -> Iterator[tuple[type, dataclasses.Field]]:
    """Every plain field with its config, those of nested configs too."""
    for field in dataclasses.fields(config):
        if nested := _nested(field):
            yield from _fields(nested)
        else:
            yield config, field


def _nested(field: dataclasses.Field) -> type | None:
    factory = field.default_factory
    return factory if isinstance(factory, type) else None


def _flag_name(field: dataclasses.Field) -> str:
    return field.name.replace("_", "-")


def _field_docs(config: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, doc in itertools.pairwise(definition.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        ):
            docs[field.target.id] = " ".join(str(doc.value.value).rstrip(".").split())
    return docs
