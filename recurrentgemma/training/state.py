"""What a training run carries from step to step, and its checkpoints.

Parameters are a flat {native name: array}: the optimizer's masks, the checkpoint and the
logs then all speak of `blocks.0.mixer.linear_x.kernel`. The place in the data and all
randomness are functions of the config's seed and of the step, so that the step is all
that has to be kept of them.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.griffin import Griffin

KEEP_CHECKPOINTS = 2
Parameters = dict[str, jax.Array]
"""Arrays by native name."""


class TrainState(NamedTuple):
    """A pytree of arrays."""

    params: Parameters
    """float32, those that are trained."""
    optimizer_state: Any
    """The optimizer's, of these parameters."""
    step: jax.Array
    """int32 scalar, number of steps done."""
    rows: Any = None
    """The cache that each row of the next batch begins with; None where rows begin with
    nothing."""


def with_parameters(model: Griffin, params: Mapping[str, Any]) -> Griffin:
    """A model like `model` with these parameters, given by native name."""
    structure = jax.tree.structure(model)
    return structure.unflatten([params[name] for name in named_parameters(model)])


def new_state(
    params: Parameters, optimizer: optax.GradientTransformation, rows: Any = None
) -> TrainState:
    """The state before the first step, of copies: a step uses up what it is given."""
    params, rows = jax.tree.map(jnp.copy, (params, rows))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), rows)


class Checkpoints:
    """Training states in a directory; each is written whole or not.

    A state is written by threads while the next steps run. It is there once `finish`
    or the next `save` has returned; a process that is killed before leaves a directory
    `*.orbax-checkpoint-tmp*`, which the next one removes.

    Args:
      directory: created if it does not exist.
      keep: number of newest states that are kept.
      keep_every: states of these multiples of steps are kept for ever.
      read_only: nothing is saved, made or removed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = KEEP_CHECKPOINTS,
        keep_every: int | None = None,
        read_only: bool = False,
    ):
        self.directory = directory.absolute()
        # Orbax writes to a temporary name and renames.
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                enable_async_checkpointing=True,
            ),
        )
        self._started: int | None = None

    @property
    def steps(self) -> list[int]:
        """The steps whose states are whole, on disk."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The newest of `steps`, None if there is none."""
        return max(self.steps, default=None)

    def save(self, state: TrainState) -> None:
        """Begins to save a state under its step, once the one before is saved.

        Raises:
          OSError: this state, or the one before, could not be written; earlier states
              are as they were.
        """
        self.finish()
        step = int(state.step)
        if step == self.latest_step:
            return
        self._started = step
        try:
            self._check_space(state)
            # Returns once the arrays, which the next step uses up, are read.
            self._manager.save(step, args=ocp.args.StandardSave(_stored(state)))
        except Exception as error:
            raise self._failure(error) from error

    def finish(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          OSError: it could not be written; earlier states are as they were.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> OSError:
        # A full disk arrives as whatever the storage library makes of it.
        for partial in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        return OSError(
            f"could not save the training state of step {self._started} in "
            f"{self.directory}: {error}. The newest saved step is "
            f"{self.latest_step}; the run resumes from there."
        )

    def _check_space(self, state: TrainState) -> None:
        # Orbax would find out too, in many lines.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(f"{needed:,} bytes are needed, {free:,} are free on the disk")

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """A saved state, once one that is being saved is on disk.

        Args:
          like: a state of the same shapes; its values do not matter.
          step: which; None is the newest.

        Raises:
          ValueError: there is none of this step, it cannot be read, or it has other
              shapes.
          OSError: the state that was being saved could not be written.
        """
        self.finish()
        steps = self.steps
        if step is None:
            step = self.latest_step
        if step not in steps:
            raise ValueError(
                f"step: expected that of a state in {self.directory}, got {step}; "
                f"there are {', '.join(map(str, steps)) or 'none'}"
            )
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _stored(like))
        try:
            restored = self._manager.restore(
                step, args=ocp.args.StandardRestore(target)
            )
        except Exception as error:
            others = [other for other in steps if other != step]
            hint = ""
            if others:
                hint = (
                    f" To go on from step {max(others)}, remove "
                    f"{self.directory / str(step)}."
                )
            raise ValueError(
                f"the training state of step {step} in {self.directory} is damaged, or "
                f"of another model or optimizer: {error}.{hint}"
            ) from error
        return TrainState(**restored)

    def close(self) -> None:
        """Waits, and releases Orbax's threads."""
        self._manager.close()


def _stored(state: TrainState) -> dict[str, Any]:
    """What is saved of a state; rows that begin with nothing are left out."""
    return {name: part for name, part in state._asdict().items() if part is not None}
