"""The tokens of a call as the layers see them, and who observes the call.

Rows are padded at their end alone: `Griffin` puts the tokens in this order once, and what
comes back in the caller's. An observer sees what layers compute by name, or replaces it.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma.kernels import meshes, sharded


class Observer(Protocol):
    """Who looks at values inside a call of the model, or replaces them.

    A value has a name such as "blocks.2.mixer.decay". An observer is part of the model
    (`Griffin.observer`): hashable, and equal to another one that does the same.
    """

    @property
    def key(self) -> str:
        """Text that tells an observer that replaces values from all others, also of
        other processes; empty for one that replaces nothing. A prefix is accepted by a
        model with the same key alone."""
        ...

    def sees(self, name: str) -> bool:
        """Whether it wants the value of this name."""
        ...

    def replaces(self, name: str) -> bool:
        """Whether it returns another value; only of one that it sees."""
        ...

    def replace(self, name: str, value: jax.Array, positions: jax.Array) -> jax.Array:
        """The value to go on with.

        Args:
          name: of a value that it replaces.
          value: [B, T, ...], any tokens of the call.
          positions: int32 [B, T], of these tokens in their documents; -1 at padding.
        """
        ...

    def show(self, name: str, value: jax.Array) -> None:
        """Sees the value that the model goes on with.

        Args:
          name: of a value that it sees.
          value: [B, T, ...], tokens in the order in which the caller gave them.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of one call as the layers see them."""

    positions: jax.Array
    """Position of each token in its document, int32 [B, T]; -1 at padding, which is at
    the end of rows alone."""
    lengths: jax.Array
    """Number of tokens of each row, int32 [B]."""
    next_position: jax.Array
    """Position after the row's last token, int32 [B]."""
    rotary: tuple[jax.Array, ...] | None
    """(cos, sin) of the rotary embedding at `positions`; None if no layer reads them."""
    order: tuple[jax.Array, jax.Array] | None = None
    """Where the caller gave each token, and where each of the caller's tokens is now,
    int32 [B, T]; None if the order is the caller's."""
    observer: Observer | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    """Who observes this call; None is nobody, which costs nothing."""
    scope: str = dataclasses.field(default="", metadata={"static": True})
    """Name of the module that observes, with a dot behind it."""

    def within(self, name: str) -> "Chunk":
        """The chunk for a module of this name inside the present one."""
        if self.observer is None:
            return self
        return dataclasses.replace(self, scope=f"{self.scope}{name}.")

    def sees(self, *names: str) -> bool:
        """Whether one of these values of the present module is observed.

        A module asks before it computes a value for the observer alone.
        """
        if self.observer is None:
            return False
        # The observer hears of all the names, also behind one that it wants.
        wanted = {self.observer.sees(self.scope + name) for name in names}
        return True in wanted

    def replaces(self, *names: str) -> bool:
        """Whether one of these values of the present module may be replaced."""
        observer = self.observer
        return self.sees(*names) and any(
            observer is not None and observer.replaces(self.scope + name)
            for name in names
        )

    def observe(
        self, name: str, value: jax.Array, *, over_tokens: bool = False
    ) -> jax.Array:
        """Shows a value to the observer; what comes back is to be used instead.

        Args:
          name: of the value in the present module.
          value: [B, T, ...].
          over_tokens: whether the last T entries of the last axis are the chunk's
            tokens too.
        """
        if self.observer is None or not self.sees(name):
            return value
        seen = self._reorder(value, 1, over_tokens)
        if self.replaces(name):
            seen = self.replace(name, seen, self._reorder(self.positions, 1))
            value = self._reorder(seen, 0, over_tokens)
        self.observer.show(self.scope + name, seen)
        return value

    def show(self, name: str, value: jax.Array, *, over_tokens: bool = False) -> None:
        """Shows a value that nobody can replace here; arguments as for `observe`."""
        if self.observer is not None and self.sees(name):
            seen = self._reorder(value, 1, over_tokens)
            self.observer.show(self.scope + name, seen)

    def replace(self, name: str, value: jax.Array, positions: jax.Array) -> jax.Array:
        """What the observer makes of a value that it replaces.

        Args:
          name: of the value in the present module.
          value: [B, T, ...], any tokens of the chunk.
          positions: int32 [B, T], of these tokens.
        """
        assert self.observer is not None, f"nobody replaces {name}"
        return self.observer.replace(self.scope + name, value, positions)

    def _reorder(self, value, order, over_tokens=False):
        """From the caller's order to the chunk's, `order` 0, or back, `order` 1."""
        if self.order is None:
            return value
        index = self.order[order]
        value = reorder(value, index)
        if over_tokens:
            others, tokens = jnp.split(value, [value.shape[-1] - index.shape[1]], -1)
            index = jnp.expand_dims(index, range(1, value.ndim - 1))
            tokens = jnp.take_along_axis(tokens, index, axis=-1)
            value = jnp.concatenate([others, tokens], axis=-1)
        return value


def reorder(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[b, index[b, t]]: [B, T, ...] and int32 [B, T] -> [B, T, ...]."""

    def run(values, index):
        index = jnp.expand_dims(index, range(2, values.ndim))
        return jnp.take_along_axis(values, index, axis=1)

    dims = "bt" + "xyz"[: values.ndim - 2]
    return meshes.run_along_time(
        f"{dims},bt->{dims}", run, sharded.take_along_time, values, index
    )


def check_positions(positions: np.ndarray, next_position: np.ndarray | None = None):
    """Checks on the host that positions are legal.

    Args:
      positions: int [B, T].
      next_position: int [B], `Cache.next_position` of the rows; None is all 0.

    Raises:
      ValueError: naming the first position of a row that is not -1 (padding), 0 (a new
        document), the previous one + 1, or any start on an empty row.
    """
    wanted = "an array of integers [B, T]"
    positions = check.array("positions", positions, wanted)
    if positions.ndim != 2 or not np.issubdtype(positions.dtype, np.integer):
        check.refuse("positions", wanted, positions)
    expected = np.zeros(len(positions), int)
    if next_position is not None:
        wanted = f"an array of integers [{len(positions)}]"
        expected = check.array("next_position", next_position, wanted)
        if expected.shape != (len(positions),) or not np.issubdtype(
            expected.dtype, np.integer
        ):
            check.refuse("next_position", wanted, next_position)
    for t, position in enumerate(positions.T):
        legal = (position == -1) | (position == 0) | (position == expected)
        legal |= (expected == 0) & (position > 0)
        if not legal.all():
            row = int(np.argmin(legal))
            raise ValueError(
                f"positions[{row}, {t}]: expected -1 (padding), 0 (a new document) or "
                f"{expected[row]} (the next of its document), got {position[row]}"
            )
        expected = np.where(position >= 0, position + 1, expected)
