"""Training: documents, packed rows, loss, optimizer, the loop and its checkpoints."""

from recurrentgemma.training.config import ComputeConfig, TrainConfig
from recurrentgemma.training.data import DataConfig, open_data
from recurrentgemma.training.guard import GuardConfig
from recurrentgemma.training.loop import train
from recurrentgemma.training.optimizer import OptimizerConfig
from recurrentgemma.training.watch import WatchConfig

__all__ = [
    "ComputeConfig",
    "DataConfig",
    "GuardConfig",
    "OptimizerConfig",
    "TrainConfig",
    "WatchConfig",
    "open_data",
    "train",
]
