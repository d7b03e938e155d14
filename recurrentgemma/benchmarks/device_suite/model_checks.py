"""Whether a whole model is right on the device: the bundled nano, beside the CPU.

Compared are the logits of a text, those of its last token after the cache of the others,
and in float32 the gradients of the loss, with the same in float32 on the CPU.
"""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from recurrentgemma.benchmarks.device_suite.checks import (
    error_figures,
    relative_error,
    truth_device,
    worst_of,
)
from recurrentgemma.benchmarks.device_suite.pieces import DEFAULT, Piece, Wrong
from recurrentgemma.benchmarks.device_suite.sizes import Size
from recurrentgemma.benchmarks.models import random_tokens
from recurrentgemma.benchmarks.report import Row
from recurrentgemma.benchmarks.train import whole_rows
from recurrentgemma.checkpoints import load, named_parameters
from recurrentgemma.config import Runtime
from recurrentgemma.griffin import Griffin
from recurrentgemma.training.data import Batch
from recurrentgemma.training.step import mean_loss

MODEL = "nano"
TOLERANCES = {
    # Some ten products deep; one pass of TensorFloat-32 would cost ten times as much.
    "float32": 2e-4,
    # Activations are rounded to 8 and to 11 bits after every layer.
    "bfloat16": 2e-2,
    "float16": 5e-3,
}
"""Relative RMS error of logits and of the gradient of a parameter, by dtype."""
LIMIT_S = 180.0


def pieces(size: Size) -> Iterator[Piece]:
    """The model in float32, and in the dtype that it has on this device."""
    for dtype in dict.fromkeys(("float32", Runtime().dtype.name)):
        work = partial(check_model, dtype, size.length)
        yield Piece("check", f"model: {MODEL}", DEFAULT, dtype, work, LIMIT_S)


def check_model(dtype: str, length: int) -> Row:
    """Compares logits and gradients.

    Args:
      dtype: in which the model computes.
      length: tokens of a row.

    Raises:
      Wrong: one of them differs by more than rounding explains.
    """
    gradients = dtype == "float32"
    found = _figures(dtype, length, gradients)
    with jax.default_device(truth_device()):
        expected = _figures("float32", length, gradients)
    errors = {
        name: relative_error(array.reshape(-1, 1), expected[name].reshape(-1, 1))
        for name, array in found.items()
    }
    row, worst = error_figures(errors), worst_of(errors)
    if not errors[worst] <= TOLERANCES[dtype]:  # true of NaN too
        raise Wrong(f"{worst}: relative RMS error {errors[worst]:.2g}", row)
    return row


def _figures(dtype: str, length: int, gradients: bool) -> dict[str, np.ndarray]:
    model, _ = load(MODEL, runtime=Runtime(compute_dtype=dtype), param_dtype="float32")
    rows = whole_rows(random_tokens(model.config, 2, length))

    @jax.jit
    def run(model: Griffin, rows: Batch) -> dict[str, jax.Array]:
        tokens = rows.tokens
        hidden, _ = model(tokens)
        _, cache = model(tokens[:, :-1])
        last, _ = model(tokens[:, -1:], cache=cache)
        found = {"logits": model.logits(hidden), "last logits": model.logits(last)}
        if not gradients:
            return found
        of_model = jax.grad(mean_loss)(model, rows)
        return found | {
            f"gradient of {name}": leaf
            for name, leaf in named_parameters(of_model).items()
        }

    return {name: np.asarray(leaf) for name, leaf in run(model, rows).items()}
