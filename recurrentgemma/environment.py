"""Whether this machine can run what a notebook wants: one report, or one sentence.

Nothing but the standard library is imported until the versions were checked, so that an
old Python or an old jax is reported as such.
"""

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Sequence

OLDEST_PYTHON = (3, 11)
OLDEST_PACKAGES = {"jax": "0.7.2", "flax": "0.11.2"}
"""Oldest supported version of each package that a runtime may hold back."""
ACCELERATORS = ("any", "cpu", "gpu", "tpu")
_REPORTED = ("recurrentgemma", "jax", "jaxlib", "flax")
_HOW_TO_CHANGE = 'in a Colab under "Runtime > Change runtime type"'


class Unsuitable(RuntimeError):
    """This machine lacks something; a notebook shows the sentence alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def check_versions() -> None:
    """Checks Python, jax and flax; a package that is not installed passes.

    Raises:
      Unsuitable: one of them is too old.
    """
    if sys.version_info[:2] < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise _too_old("Python", oldest, sys.version.split()[0])
    for name, oldest in OLDEST_PACKAGES.items():
        found = _version(name)
        if found is not None and _numbers(found) < _numbers(oldest):
            raise _too_old(name, oldest, found)


def check(accelerator: str = "any", *, needs: Sequence[str] = ()) -> str:
    """Checks versions, packages and the device, and reports them.

    Args:
      accelerator: "cpu", "gpu" or "tpu" if jax has to run there; "any" takes what jax
        finds.
      needs: names of further modules that have to be installed, such as "matplotlib".

    Returns:
      Three lines: device, versions, and the dtype that models compute in by default.

    Raises:
      ValueError: there is no such accelerator.
      Unsuitable: a version is too old, a module is missing, or jax does not run on the
        accelerator.
    """
    if accelerator not in ACCELERATORS:
        raise ValueError(
            f"accelerator: expected one of {', '.join(ACCELERATORS)}, got "
            f"{accelerator!r}"
        )
    check_versions()
    for name in needs:
        if importlib.util.find_spec(name) is None:
            raise Unsuitable(
                f"{name}: expected it to be installed, as this notebook uses it, got "
                f"none; run %pip install {name}, then this cell again"
            )
    device = _device(accelerator)
    from recurrentgemma.config import Runtime

    versions = [f"{name} {_version(name)}" for name in _REPORTED if _version(name)]
    return "\n".join(
        [
            f"device:   {device}",
            f"versions: Python {sys.version.split()[0]}, {', '.join(versions)}",
            f"dtype:    {Runtime().dtype}",
        ]
    )


def _device(accelerator: str) -> str:
    """The devices that jax runs on, if they are of this kind."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise Unsuitable(
            f"accelerator: expected {accelerator}, got none that jax can start "
            f"({' '.join(str(error).split())}); choose another {_HOW_TO_CHANGE}"
        ) from error
    platform = devices[0].platform
    if accelerator not in ("any", platform):
        raise Unsuitable(
            f"accelerator: expected a {accelerator.upper()}, got only a "
            f"{platform.upper()}; choose one {_HOW_TO_CHANGE}, or set ACCELERATOR to "
            '"any"'
        )
    if platform == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    return f"{platform.upper()}, {len(devices)} x {devices[0].device_kind}"


def _too_old(name: str, oldest: str, found: str) -> Unsuitable:
    return Unsuitable(
        f"{name}: expected {oldest} or newer, got {found}; choose a newer runtime "
        f"version {_HOW_TO_CHANGE}"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 7, 2) of "0.7.2.dev3"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
