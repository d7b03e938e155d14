"""Training: documents, packed rows, loss, optimizer, the loop and its checkpoints."""

from recurrentgemma.training.config import ComputeConfig, TrainConfig
from recurrentgemma.training.guard import GuardConfig
from recurrentgemma.training.loop import train
from recurrentgemma.training.optimizer import OptimizerConfig
from recurrentgemma.training.watch import WatchConfig

__all__ = [
    "ComputeConfig",
    "GuardConfig",
    "OptimizerConfig",
    "TrainConfig",
    "WatchConfig",
    "train",
]
