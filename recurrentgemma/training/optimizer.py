"""AdamW with a schedule, a clip and a decay mask.

Weight decay pulls matrices to zero, where a matrix does nothing. Norm scales, biases,
the embedding and what the class of a temporal mixer names (the convolution and the
RG-LRU) have other natural values and are left alone (RecurrentGemma report, section 3).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax

from recurrentgemma import _validation as check
from recurrentgemma.checkpoints.parameters import mixer_of
from recurrentgemma.config import GriffinConfig
from recurrentgemma.training.options import option

COSINE, WSD = "cosine", "wsd"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Raises:
      ValueError: a value is outside its range.
    """

    learning_rate: float = option(
        "highest learning rate, reached after the warm-up", default=3e-3
    )
    final_learning_rate_ratio: float = option(
        "last learning rate, as a share of the highest", default=0.05
    )
    schedule: str = option(
        f"learning rate after the warm-up: {COSINE}; or {WSD}, constant until the "
        "cool-down",
        default=COSINE,
    )
    warmup_steps: int = option(
        "steps over which the learning rate rises from 0; at most a tenth of all steps",
        default=100,
    )
    cooldown_steps: int | None = option(
        f"last steps of {WSD}, over which the learning rate falls; none: a fifth of all",
        default=None,
    )
    b1: float = option("decay of the mean gradient", default=0.9)
    b2: float = option("decay of the mean squared gradient", default=0.98)
    epsilon: float = option(
        "number added to the root of the mean squared gradient", default=1e-8
    )
    weight_decay: float = option(
        "share of a matrix that a step takes away, times the learning rate",
        default=0.1,
    )
    clip_norm: float = option(
        "largest global norm of a gradient; a larger one is scaled down to it",
        default=1.0,
    )

    def __post_init__(self):
        for name in ("learning_rate", "epsilon", "clip_norm"):
            check.number(name, getattr(self, name), above=0)
        for name in ("b1", "b2", "final_learning_rate_ratio"):
            check.share(name, getattr(self, name))
        check.number("weight_decay", self.weight_decay, least=0)
        check.count("warmup_steps", self.warmup_steps)
        if self.cooldown_steps is not None:
            check.count("cooldown_steps", self.cooldown_steps)
        check.choice("schedule", self.schedule, (COSINE, WSD))


def is_decayed(name: str, model_config: GriffinConfig) -> bool:
    """Whether weight decay applies to a parameter, by its native name."""
    mixer, inner = mixer_of(name, model_config)
    if mixer is not None:
        return mixer.is_decayed(inner)
    return name.split(".")[-1] == "kernel"


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step.

    Linear to the highest; then a cosine to the last, or constant and, over the last
    steps, down as 1 - sqrt (warm-up, stable, decay: arXiv 2405.18392, section 3.1).

    Args:
      config: rates and lengths.
      steps: number of steps of the run.
    """
    warmup_steps = min(config.warmup_steps, steps // 10)
    if config.schedule == COSINE:
        return optax.warmup_cosine_decay_schedule(
            init_value=config.learning_rate / (warmup_steps + 1),
            peak_value=config.learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=steps,
            end_value=config.learning_rate * config.final_learning_rate_ratio,
        )
    highest, last = config.learning_rate, config.final_learning_rate_ratio
    cooldown = steps // 5 if config.cooldown_steps is None else config.cooldown_steps
    cooldown = min(cooldown, steps)

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((done + 1) / (warmup_steps + 1), 1.0)
        fallen = jnp.clip((done - (steps - cooldown)) / max(cooldown, 1), 0.0, 1.0)
        return highest * rising * (1 - (1 - last) * jnp.sqrt(fallen))

    return rate


def make_optimizer(
    config: OptimizerConfig, steps: int, model_config: GriffinConfig
) -> optax.GradientTransformation:
    """An optimizer of a model's parameters, given as {native name: array}."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=partial(_decay_mask, model_config),
        ),
    )


def _decay_mask(
    model_config: GriffinConfig, params: dict[str, jax.Array]
) -> dict[str, bool]:
    return {name: is_decayed(name, model_config) for name in params}
