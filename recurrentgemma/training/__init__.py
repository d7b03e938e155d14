"""Training: documents, packed rows, loss, optimizer, the loop and its checkpoints.

`train(TrainConfig(...))` is a whole run. A loop of one's own needs little of it:

    import optax
    from recurrentgemma import load, save
    from recurrentgemma.checkpoints import named_parameters
    from recurrentgemma.training import make_train_step, new_state, whole_rows
    from recurrentgemma.training.state import with_parameters

    model, tokenizer = load("nano", param_dtype="float32")
    optimizer = optax.adamw(1e-4)
    state = new_state(named_parameters(model), optimizer)
    train_step = make_train_step(model, optimizer)
    for tokens in batches:  # yours: int32 [B, T + 1], a document in each row
        state, metrics = train_step(state, {}, whole_rows(tokens))
    save("tuned", with_parameters(model, state.params), tokenizer)

The second argument of a step are parameters that are not trained, by native name.
`recurrentgemma.training.step` says what a batch and the metrics are; `mean_loss(model,
batch)` is what `jax.grad` takes, and `guarded(optimizer)` survives a bad step.
"""

from recurrentgemma.training.config import ComputeConfig, TrainConfig
from recurrentgemma.training.data import DataConfig, open_data
from recurrentgemma.training.guard import GuardConfig, guarded
from recurrentgemma.training.loop import train
from recurrentgemma.training.optimizer import OptimizerConfig
from recurrentgemma.training.state import TrainState, new_state, with_parameters
from recurrentgemma.training.step import make_train_step, mean_loss, whole_rows
from recurrentgemma.training.watch import WatchConfig

__all__ = [
    "ComputeConfig",
    "DataConfig",
    "GuardConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TrainState",
    "WatchConfig",
    "guarded",
    "make_train_step",
    "mean_loss",
    "new_state",
    "open_data",
    "train",
    "whole_rows",
    "with_parameters",
]
