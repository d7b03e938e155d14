"""AdamW with a warm-up, a cosine, a clip and a decay mask.

Weight decay pulls matrices to zero, where a matrix does nothing. Norm scales, biases,
the embedding and what the class of a temporal mixer names (the convolution and the
RG-LRU) have other natural values and are left alone (RecurrentGemma report, section 3).
"""

import dataclasses
from functools import partial

import jax
import optax

from recurrentgemma.checkpoints.parameters import mixer_of
from recurrentgemma.config import GriffinConfig
from recurrentgemma.training.options import option


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
    warmup_steps: int = option(
        "steps over which the learning rate rises from 0; at most a tenth of all steps",
        default=100,
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
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("b1", "b2", "final_learning_rate_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


def is_decayed(name: str, model_config: GriffinConfig) -> bool:
    """Whether weight decay applies to a parameter, by its native name."""
    mixer, inner = mixer_of(name, model_config)
    if mixer is not None:
        return mixer.is_decayed(inner)
    return name.split(".")[-1] == "kernel"


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear to the highest, then a cosine to the last."""
    warmup_steps = min(config.warmup_steps, steps // 10)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_learning_rate_ratio,
    )


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
