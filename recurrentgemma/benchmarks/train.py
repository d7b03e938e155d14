"""Tokens/s of a train step: loss, gradients and an AdamW update, against length.

Rows are whole documents of `length` random tokens; parameters and the optimizer's
moments are float32. The ceiling is the device's matrix product at three times the FLOPs
of a forward pass.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recurrentgemma import cost
from recurrentgemma.benchmarks.models import (
    Subject,
    check_memory,
    needed_bytes,
    random_tokens,
)
from recurrentgemma.benchmarks.report import Row
from recurrentgemma.benchmarks.sweep import Point, Sweep, speed
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.training.data import Batch
from recurrentgemma.training.state import TrainState
from recurrentgemma.training.step import make_train_step


def measure(subject: Subject, point: Point, values: dict[str, Any]) -> Row:
    """Takes train steps, one to warm up and then one for each sample."""
    del values
    config, length = subject.config, point.length
    # Parameters, gradients and two moments.
    check_memory(4 * 4 * cost.num_parameters(config), subject.memory)
    optimizer = optax.adamw(1e-4, b2=0.96, weight_decay=0.1)

    def new_state(model: Any) -> TrainState:
        params = named_parameters(model)
        params = {name: jnp.array(leaf, jnp.float32) for name, leaf in params.items()}
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    batch = _batch(random_tokens(config, point.batch, length))
    start = time.perf_counter()
    step = make_train_step(subject.model, optimizer)
    shapes = jax.eval_shape(new_state, subject.model)
    compiled = step.lower(shapes, {}, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    compile_s = time.perf_counter() - start
    check_memory(needed_bytes(compiled), subject.memory)
    state, _ = compiled(new_state(subject.model), {}, batch)
    samples = []
    for _ in range(point.repeats):
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, {}, batch))
        samples.append(time.perf_counter() - start)
    flops = cost.train_flops_per_token(config, length)
    ceiling = point.rates["product_flops_per_s"] / flops
    found = speed(samples, point.batch * length, ceiling)
    return found | {"compile_s": compile_s, "needed_bytes": needed_bytes(compiled)}


def _batch(tokens: np.ndarray) -> Batch:
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        positions=positions,
        mask=(positions < tokens.shape[1] - 1).astype(np.float32),
    )


SWEEP = Sweep("train", measure, lengths="512,1k,2k,4k")
define_flags, run = SWEEP.define_flags, SWEEP.run
