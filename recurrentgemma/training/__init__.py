"""Training: documents, packed rows, loss, optimizer, the loop and its checkpoints."""

from recurrentgemma.training.loop import TrainConfig, train
from recurrentgemma.training.optimizer import OptimizerConfig

__all__ = ["OptimizerConfig", "TrainConfig", "train"]
