"""Trains a small model on a task and says how often it answers right.

Every row is new, so there is nothing to overfit. The learning rate enters the compiled
step as a number: a sweep compiles one program for each architecture.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from recurrentgemma.benchmarks.recall.tasks import Examples, Task
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.config import GriffinConfig
from recurrentgemma.griffin import Griffin
from recurrentgemma.training.optimizer import OptimizerConfig, make_optimizer
from recurrentgemma.training.state import with_parameters

EVALUATION_SEED = 2**31
"""Seed of the rows of evaluation; training uses the run's seed, which is far below."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and on what a model trains."""

    lengths: tuple[int, ...]
    """Lengths that steps take in turn; one program for each."""
    steps: int
    """Most updates of the parameters."""
    batch_size: int
    """Rows of a step."""
    evaluate_every: int = 100
    """Steps between looks at the accuracy; a run ends early where all is right."""
    evaluation_rows: int = 64
    """Rows of an evaluation."""
    weight_decay: float = 0.1
    """Share of a matrix that a step takes away, times the learning rate."""


class Result(NamedTuple):
    """What a training run came to."""

    params: dict[str, jax.Array]
    """Parameters by native name."""
    steps: int
    """Updates done."""
    curve: list[tuple[int, float]]
    """(step, accuracy on the longest training length)."""


class Learner:
    """One architecture on one task; its programs are compiled once.

    Args:
      task: gives rows.
      config: of the model; its vocabulary is the task's.
      plan: steps and sizes.
    """

    def __init__(self, task: Task, config: GriffinConfig, plan: Plan):
        self.task, self.config, self.plan = task, config, plan
        self._model = nnx.eval_shape(lambda: Griffin(config, rngs=nnx.Rngs(0)))
        # AdamW's update is proportional to the learning rate: 1 here, scaled in a step.
        settings = OptimizerConfig(
            learning_rate=1.0,
            warmup_steps=plan.steps // 10,
            final_learning_rate_ratio=0.0,
            weight_decay=plan.weight_decay,
        )
        self._optimizer = make_optimizer(settings, plan.steps, config)
        self._step = jax.jit(self._update, donate_argnums=(0, 1))
        self._right = jax.jit(self._count_right)

    def train(self, learning_rate: float, seed: int) -> Result:
        """A run from random parameters.

        Args:
          learning_rate: its highest value.
          seed: of the parameters and the rows.
        """
        params = named_parameters(Griffin(self.config, rngs=nnx.Rngs(seed)))
        state, rng = self._optimizer.init(params), np.random.default_rng(seed)
        curve: list[tuple[int, float]] = []
        step = 0
        while step < self.plan.steps:
            length = self.plan.lengths[step % len(self.plan.lengths)]
            rows = self.task.sample(rng, self.plan.batch_size, length)
            params, state = self._step(params, state, learning_rate, rows)
            step += 1
            if step % self.plan.evaluate_every == 0 or step == self.plan.steps:
                accuracy = self.accuracy(params, max(self.plan.lengths))
                curve.append((step, accuracy))
                if accuracy == 1.0:
                    break
        return Result(params, step, curve)

    def accuracy(
        self,
        params: dict[str, jax.Array],
        length: int,
        *,
        task: Task | None = None,
        rows: int | None = None,
    ) -> float:
        """Share of right answers.

        Args:
          params: by native name.
          length: of the rows, any.
          task: another task than that of training, such as one with more pairs.
          rows: number of rows; None is the plan's.
        """
        rng = np.random.default_rng((EVALUATION_SEED, length))
        count = rows or self.plan.evaluation_rows
        size = min(count, self.plan.batch_size)
        right = []
        for _ in range(-(-count // size)):
            examples = (task or self.task).sample(rng, size, length)
            right.append(np.asarray(self._right(params, examples)))
        return float(np.concatenate(right).mean())

    def _answers(self, params: dict[str, jax.Array], examples: Examples) -> jax.Array:
        """Logits [B, K, V] where answers are due."""
        model = with_parameters(self._model, params)
        hidden, _ = model(jnp.asarray(examples.tokens))
        chosen = jnp.take_along_axis(hidden, examples.places[..., None], axis=1)
        return model.logits(chosen)

    def _update(self, params, state, learning_rate, examples) -> tuple[Any, Any]:
        def loss(params):
            nats = optax.softmax_cross_entropy_with_integer_labels(
                self._answers(params, examples), examples.answers
            )
            return nats.mean()

        updates, state = self._optimizer.update(jax.grad(loss)(params), state, params)
        updates = jax.tree.map(lambda update: learning_rate * update, updates)
        return optax.apply_updates(params, updates), state

    def _count_right(self, params, examples) -> jax.Array:
        return self._answers(params, examples).argmax(-1) == examples.answers
