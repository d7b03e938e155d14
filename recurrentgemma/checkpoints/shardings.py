"""Which sharding each parameter gets, checked before anything is read."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

Sharding = (
    jax.sharding.Sharding
    | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
    | Mapping[str, Any]
)


def shardings_by_name(
    sharding: Sharding | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, jax.sharding.Sharding | None]:
    """The sharding of each parameter.

    Args:
      sharding: as for `load`.
      shapes: shapes of the parameters, by native name.

    Returns:
      Shardings by native name; None is the default device.

    Raises:
      ValueError: a parameter has no sharding, its sharding does not fit its shape or no
        computation can use it, or the parameters are not all on one mesh.
    """
    choose = _chooser(sharding)
    chosen = {name: choose(name, shape) for name, shape in shapes.items()}
    first = None
    for name, shape in shapes.items():
        if chosen[name] is None:
            continue
        _check(chosen[name], name, shape)
        first = first or name
        expected, found = _devices(chosen[first]), _devices(chosen[name])
        if found != expected:
            raise ValueError(
                f"sharding: expected the devices of all parameters to be one mesh, got "
                f"{expected} for {first} and {found} for {name}; use the same mesh for "
                "both."
            )
    return chosen


def _chooser(sharding: Sharding | None) -> Callable[[str, tuple[int, ...]], Any]:
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return lambda name, shape: sharding
    if callable(sharding):
        return sharding
    leaves, _ = jax.tree_util.tree_flatten_with_path(sharding)
    by_name = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        by_name[name.removesuffix(".value")] = leaf
    if set(by_name) == {""}:
        raise ValueError(
            "sharding: expected a jax.sharding.Sharding, a function of a name and a "
            f"shape, or shardings by name, got {sharding!r}."
        )

    def choose(name: str, shape: tuple[int, ...]) -> Any:
        if name not in by_name:
            raise ValueError(f"sharding: expected an entry for {name}, got none.")
        return by_name[name]

    return choose


def _check(sharding: Any, name: str, shape: tuple[int, ...]) -> None:
    if not isinstance(sharding, NamedSharding | SingleDeviceSharding):
        raise ValueError(  # noqa: TRY004
            "sharding: expected a NamedSharding or a SingleDeviceSharding for "
            f"{name}, got {sharding!r}."
        )
    where = f"sharding: {name} of shape {list(shape)} cannot be placed as {sharding}"
    if AxisType.Manual in getattr(_devices(sharding), "axis_types", ()):
        raise ValueError(
            f"{where}: the mesh has Manual axes; use Auto or Explicit ones."
        )
    try:
        sharding.shard_shape(shape)
        [device, *_] = sharding.addressable_devices_indices_map(shape)
    except Exception as error:  # JAX has no common type for what does not fit.
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{where}: {reason}.") from error
    default = device.default_memory().kind
    if sharding.memory_kind not in (None, default):
        raise ValueError(
            f"{where}: expected the memory {default!r}, in which parameters are used, "
            f"got {sharding.memory_kind!r}."
        )


def _devices(sharding: Any) -> Any:
    if isinstance(sharding, NamedSharding):
        return sharding.mesh
    [device] = sharding.device_set
    return device
