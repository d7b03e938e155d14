"""Fields of configs that say what they are, for the flags of the command."""

import dataclasses
from collections.abc import Iterator
from typing import Any


def option(help: str, **settings: Any) -> Any:
    """A dataclass field with a text for `--help`.

    Args:
        help: what the field is, as one sentence without its full stop.
        **settings: as for `dataclasses.field`, such as `default`.
    """
    return dataclasses.field(metadata={"help": help}, **settings)


def options(config: type) -> Iterator[dataclasses.Field]:
    """Every field of a config that is an option, those of nested configs too."""
    for field in dataclasses.fields(config):
        if nested := nested_config(field):
            yield from options(nested)
        else:
            yield field


def nested_config(field: dataclasses.Field) -> type | None:
    """The config that a field holds, or None for a plain field."""
    factory = field.default_factory
    return factory if dataclasses.is_dataclass(factory) else None
