"""Training: documents, packed rows, loss, optimizer, the loop and its checkpoints."""

from recurrentgemma.training.data import DataConfig, open_data
from recurrentgemma.training.loop import TrainConfig, train
from recurrentgemma.training.optimizer import OptimizerConfig

__all__ = ["DataConfig", "OptimizerConfig", "TrainConfig", "open_data", "train"]
