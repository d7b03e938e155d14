"""Interpretation of TPU kernels that looks for races and for memory nobody wrote."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def watched(capfd, races: bool = True) -> Iterator[Any]:
    """Two cores share the parallel axes of a grid, whose order is drawn at random.

    That is slow: without `races`, the plain interpretation.
    """
    if not races:
        yield True
        return
    fields = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    # Newer jax first.
    names = ("num_cores_or_threads", "num_cores_per_device")
    cores = next(name for name in names if name in fields)
    pltpu.reset_tpu_interpret_mode_state()
    yield pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", random_seed=3, **{cores: 2}
    )
    assert "RACE DETECTED" not in capfd.readouterr().out
