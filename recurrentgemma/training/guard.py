"""Steps that must not count: a loss or gradient that is not finite, or a loss that jumps.

`guarded(optimizer, config)` leaves parameters and moments as they were at such a step,
inside the compiled program: a bad batch can spoil nothing. What then happens, the loop
decides: it stops, or goes on with the next batch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from recurrentgemma._validation import choice, number, positive_integer
from recurrentgemma.training.options import option

STOP, SKIP = "stop", "skip"
MEAN_DECAY = 0.98
"""Decay of the mean loss of a step: it is of about the last 50 steps."""
FIRST_STEPS = 50
"""Steps that count before a loss can be a spike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens at a step that must not count.

    Raises:
      ValueError: a value is outside its range.
    """

    on_bad_step: str = option(
        "what happens where the loss or its gradient is not finite, or the loss is a "
        f"spike: {STOP}, or {SKIP} the step; the parameters are as before in both cases",
        default=STOP,
        may_change=True,
    )
    spike_ratio: float | None = option(
        "a loss of so many times the mean of the last 50 steps is a spike; none: no "
        "loss is",
        default=None,
    )
    most_skips: int = option(
        "number of steps in a row that may be skipped before the run stops",
        default=20,
        may_change=True,
    )

    def __post_init__(self):
        choice("on_bad_step", self.on_bad_step, (STOP, SKIP))
        if self.spike_ratio is not None:
            number("spike_ratio", self.spike_ratio, above=1)
        positive_integer("most_skips", self.most_skips)


class GuardState(NamedTuple):
    """The optimizer's state, and what decides about the next step."""

    inner: Any
    mean_loss: jax.Array
    """float32, decayed mean from 0: divide it by 1 - MEAN_DECAY ** counted."""
    counted: jax.Array
    """int32, steps that counted."""
    skipped: jax.Array
    """int32, steps that did not."""


def guarded(
    optimizer: optax.GradientTransformation, config: GuardConfig = GuardConfig()
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, which does nothing at a bad step.

    Its `update` takes `loss` and `gradient_norm`, scalars. A step that did not count
    is none of the schedule's either.
    """

    def init(params):
        counted, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
        return GuardState(optimizer.init(params), jnp.zeros(()), counted, skipped)

    def update(updates, state, params=None, **scalars):
        loss, gradient_norm = scalars["loss"], scalars["gradient_norm"]
        good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        if config.spike_ratio is not None:
            weight = 1 - MEAN_DECAY ** state.counted.astype(jnp.float32)
            spike = loss * weight > config.spike_ratio * state.mean_loss
            good &= ~(spike & (state.counted >= FIRST_STEPS))
        new_updates, inner = optimizer.update(updates, state.inner, params)
        mean_loss = MEAN_DECAY * state.mean_loss + (1 - MEAN_DECAY) * loss
        counted = GuardState(inner, mean_loss, state.counted + 1, state.skipped)
        skipped = state._replace(skipped=state.skipped + 1)
        return (
            jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), new_updates),
            choose(good, counted, skipped),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def choose(condition: jax.Array, one: Any, other: Any) -> Any:
    """One of two pytrees of the same shapes."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)
