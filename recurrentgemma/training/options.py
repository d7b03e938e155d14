"""Fields of configs that say what they are, for flags, files and `--set a.b=c`.

A config is a frozen dataclass. Its fields are options, or configs again.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any


def option(help: str, *, may_change: bool = False, **settings: Any) -> Any:
    """A dataclass field with a text for `--help`.

    Args:
      help: what the field is, as one sentence without its full stop.
      may_change: whether a run may be resumed with another value.
      **settings: as for `dataclasses.field`, such as `default`.
    """
    metadata = {"help": help, "may_change": may_change}
    return dataclasses.field(metadata=metadata, **settings)


def options(config: type) -> Iterator[dataclasses.Field]:
    """Every field of a config that is an option, those of nested configs too."""
    return (field for _, field in option_fields(config))


def option_fields(config: type) -> Iterator[tuple[type, dataclasses.Field]]:
    """The same fields, each after the config that has it."""
    for field in dataclasses.fields(config):
        if nested := nested_config(field):
            yield from option_fields(nested)
        else:
            yield config, field


def nested_config(field: dataclasses.Field) -> type | None:
    """The config that a field holds, or None for a plain field."""
    factory = field.default_factory
    return factory if dataclasses.is_dataclass(factory) else None


def kind_of(config: type, field: dataclasses.Field) -> tuple[type, bool]:
    """The class of an option's values: bool, int, float, str or tuple (of strings); and
    whether it may be None."""
    found = typing.get_type_hints(config)[field.name]
    kinds = [found]
    if isinstance(found, types.UnionType):
        kinds = list(typing.get_args(found))
    plain = [typing.get_origin(kind) or kind for kind in kinds]
    known = [k for k in (bool, int, float, tuple, str) if k in plain]
    return (known[0] if known else str), types.NoneType in plain


def parse(text: str, kind: type, optional: bool = False) -> Any:
    """The value of an option in a text, as a flag or `--set` writes it.

    Raises:
      ValueError: it is not of that kind.
    """
    if optional and text.lower() == "none":
        return None
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text.lower() == "true"
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return kind(text)
    except ValueError:
        names = {int: "an integer", float: "a number"}
        raise ValueError(f"expected {names[kind]}, got {text!r}") from None


def with_overrides(config: Any, assignments: typing.Iterable[str]) -> Any:
    """The config with other values of some fields.

    Args:
      config: a frozen dataclass.
      assignments: such as "optimizer.learning_rate=1e-3", in this order.

    Raises:
      ValueError: an assignment has no `=`, names no field or has a wrong value.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"set: expected FIELD=VALUE, got {assignment!r}")
        config = _replace(config, path.strip().split("."), text, path.strip())
    return config


def _replace(config: Any, path: list[str], text: str, whole: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(config)}
    name, *rest = path
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=3) or sorted(fields)
        raise ValueError(
            f"set: expected the name of a field, got {whole!r}; "
            f"did you mean {', '.join(close)}?"
        )
    value = getattr(config, name)
    if dataclasses.is_dataclass(value) == bool(rest):
        if rest:
            return dataclasses.replace(
                config, **{name: _replace(value, rest, text, whole)}
            )
        kind = kind_of(type(config), fields[name])
        try:
            return dataclasses.replace(config, **{name: parse(text, *kind)})
        except ValueError as error:
            raise ValueError(f"set {whole}: {error}") from error
    if rest:
        raise ValueError(f"set: {whole!r} names a field of {name!r}, which has none")
    inner = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(value))
    raise ValueError(f"set: expected a field of {whole!r}, such as {inner}")


def to_dict(config: Any) -> dict[str, Any]:
    """The fields as JSON values."""
    fields = dataclasses.asdict(config)
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def with_defaults(stored: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """A recorded config, with the default of each field that was not there yet."""
    fields = dict(stored)
    for field in dataclasses.fields(kind):
        if nested := nested_config(field):
            fields[field.name] = with_defaults(stored.get(field.name, {}), nested)
        elif field.default is not dataclasses.MISSING:
            fields.setdefault(field.name, _plain(field.default))
    return fields


def from_dict(kind: type, stored: Mapping[str, Any]) -> Any:
    """The config that was recorded as `to_dict`; what it lacks has its default.

    Raises:
      ValueError: it has a field that there is not, or a value that cannot be.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(stored.keys() - fields.keys())
    if unknown:
        raise ValueError(
            f"expected fields of {kind.__name__}, got {', '.join(unknown)}; known are "
            f"{', '.join(fields)}"
        )
    given = {}
    for name, value in stored.items():
        if nested := nested_config(fields[name]):
            value = from_dict(nested, value)
        elif isinstance(value, list):
            value = tuple(value)
        given[name] = value
    return kind(**given)


def differences(
    stored: Mapping[str, Any], fields: Mapping[str, Any], kind: type, path: str = ""
) -> list[str]:
    """Fields whose recorded value is another one, and may not change."""
    free = {f.name for f in dataclasses.fields(kind) if f.metadata.get("may_change")}
    nested = {f.name: c for f in dataclasses.fields(kind) if (c := nested_config(f))}
    found = []
    for name in sorted((stored.keys() | fields.keys()) - free):
        if name in nested:
            inner = stored[name], fields[name], nested[name]
            found += differences(*inner, f"{path}{name}.")
        elif (theirs := stored.get(name)) != (ours := fields.get(name)):
            found.append(f"{path}{name} is {theirs!r}, not {ours!r}")
    return found
