"""Adapters in a training run: options, and what becomes of a run that is done.

    model = config.adapters.add_to(model, config.seed)     # before it is trained
    names = config.adapters.trained(config.train_only)     # everything else is frozen
    model = config.adapters.finish(output, model)          # adapters saved; merged

With rank 0 each of these gives back what it is given.
"""

import dataclasses
from pathlib import Path

from flax import nnx

from recurrentgemma import _validation as check
from recurrentgemma.adapters import (
    TRAINED,
    add_adapters,
    merge_adapters,
    save_adapters,
)
from recurrentgemma.griffin import Griffin
from recurrentgemma.training.options import option

ADAPTERS_FILE = "adapters.safetensors"
"""In the directory of a run: its adapters alone."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Adapters of low rank, which are trained in the place of the parameters.

    Raises:
      ValueError: a value is outside its range.
    """

    adapter_rank: int = option(
        "rank of the adapters that are trained (LoRA); 0 trains the parameters",
        default=0,
    )
    adapter_alpha: float | None = option(
        "what the adapters are multiplied by, times their rank; the rank if not given",
        default=None,
    )
    adapter_matrices: tuple[str, ...] = option(
        "patterns of the names of the matrices that get an adapter; all linear layers "
        "if none is given",
        default=(),
    )

    def __post_init__(self):
        check.count("adapter_rank", self.adapter_rank)
        if self.adapter_alpha is not None:
            check.number("adapter_alpha", self.adapter_alpha, above=0)

    def add_to(self, model: Griffin, seed: int) -> Griffin:
        """The model with adapters on the chosen matrices, stacked or not."""
        if not self.adapter_rank:
            return model
        return add_adapters(
            model,
            self.adapter_matrices or None,
            rank=self.adapter_rank,
            alpha=self.adapter_alpha,
            rngs=nnx.Rngs(seed),
        )

    def trained(self, patterns: tuple[str, ...]) -> tuple[str, ...]:
        """The patterns of what is trained: those given, or else the adapters'."""
        return TRAINED if self.adapter_rank and not patterns else patterns

    def finish(self, output: Path, model: Griffin) -> Griffin:
        """Saves the adapters in the directory of the run; the merged model."""
        if not self.adapter_rank:
            return model
        save_adapters(output / ADAPTERS_FILE, model)
        return merge_adapters(model)
