"""What a training run carries from step to step, and its checkpoints.

Parameters are a flat {native name: array}: the optimizer's masks, the checkpoint and the
logs then all speak of `blocks.0.mixer.linear_x.kernel`.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
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


def with_parameters(model: Griffin, params: Parameters) -> Griffin:
    """A model like `model` with these parameters, given by native name."""
    structure = jax.tree.structure(model)
    return structure.unflatten([params[name] for name in named_parameters(model)])


class Checkpoints:
    """Training states in a directory, the newest few; each is written whole or not.

    Args:
        directory: created if it does not exist.
    """

    def __init__(self, directory: Path):
        self.directory = directory.absolute()
        # Orbax writes to a temporary name and renames.
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEEP_CHECKPOINTS, enable_async_checkpointing=False
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest state, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves a state under its step.

        Raises:
            OSError: it could not be written; earlier states are as they were.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        try:
            self._check_space(state)
            self._manager.save(step, args=ocp.args.StandardSave(_stored(state)))
            self._manager.wait_until_finished()
        except Exception as error:
            # A full disk arrives as whatever the storage library makes of it.
            for partial in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"could not save the training state of step {step} in "
                f"{self.directory}: {error}. The newest saved step is "
                f"{self.latest_step}; the run resumes from there."
            ) from error

    def _check_space(self, state: TrainState) -> None:
        # Orbax would find out too, in many lines.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(f"{needed:,} bytes are needed, {free:,} are free on the disk")

    def restore(self, like: TrainState) -> TrainState:
        """The newest state.

        Args:
            like: a state of the same shapes; its values do not matter.

        Raises:
            ValueError: it cannot be read, or has other shapes.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _stored(like))
        try:
            restored = self._manager.restore(
                self.latest_step, args=ocp.args.StandardRestore(target)
            )
        except Exception as error:
            raise ValueError(
                f"the training state of step {self.latest_step} in {self.directory} "
                f"is damaged, or of another model: {error}"
            ) from error
        return TrainState(**restored)

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


def _stored(state: TrainState) -> dict[str, Any]:
    """What is saved of a state; rows that begin with nothing are left out."""
    return {name: part for name, part in state._asdict().items() if part is not None}
