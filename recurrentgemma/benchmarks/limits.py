"""What this machine's arithmetic and memory allow: the ceiling beside each figure.

Prefill and training are bound by matrix products, decode by reading every parameter
once a step. The two rates are measured here with the model's own shapes; what the model
needs comes from `recurrentgemma.cost`.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import cost
from recurrentgemma.benchmarks.measures import Plan
from recurrentgemma.config import GriffinConfig

ROWS = 1024
"""Rows of the matrix product: a chunk of prefill."""
REPETITIONS = 10


def rates(config: GriffinConfig) -> dict[str, float]:
    """Best of several matrix products (FLOP/s) and matrix-vector products (bytes/s)."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    product = jax.jit(jnp.matmul)
    x, w = matrix(ROWS, config.width), matrix(config.width, config.mlp_width)
    flops = 2 * ROWS * w.size / _best_seconds(lambda: product(x, w))
    row, embedding = matrix(1, config.width), matrix(config.vocab_size, config.width)
    score = jax.jit(lambda row, embedding: row @ embedding.T)
    bandwidth = embedding.nbytes / _best_seconds(lambda: score(row, embedding))
    return {"matmul_flops_per_s": flops, "matvec_bytes_per_s": bandwidth}


def limits(config: GriffinConfig, plan: Plan, measured: dict[str, float]) -> dict:
    """Ceiling in tokens/s of each line of the comparison that has one.

    Args:
      config: The model.
      plan: The lines.
      measured: What `rates` returned.
    """
    logits_flops = 2 * config.vocab_size * config.width
    ceilings = {}
    for length in plan.prefill_lengths:  # the logits of a prompt are not computed
        flops = cost.forward_flops_per_token(config, length) - logits_flops
        ceilings[f"prefill {length}"] = measured["matmul_flops_per_s"] / flops
    flops = cost.train_flops_per_token(config, plan.train_length)
    train = measured["matmul_flops_per_s"] / flops
    ceilings[f"train step {plan.train_length}"] = train
    for batch in plan.decode_batches:
        moved = cost.decode_bytes(config, batch, dtype=jnp.float32)
        steps_per_s = measured["matvec_bytes_per_s"] / moved
        ceilings[f"decode, batch {batch}"] = batch * steps_per_s
    return ceilings


def _best_seconds(run: Callable[[], jax.Array]) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)
