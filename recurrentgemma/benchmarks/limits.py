"""What this machine's arithmetic and memory allow: the ceiling beside each figure.

Prefill and training are bound by matrix products, decode by reading every parameter
once a step. The rates are those of XLA's own products here, of the model's shapes and
over more memory than any cache holds; what the model needs comes from
`recurrentgemma.cost`.
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import cost
from recurrentgemma.benchmarks.measures import Plan
from recurrentgemma.config import GriffinConfig

ROWS = 1024
"""Rows of the matrix product: a chunk of prefill."""
REPETITIONS = 10
WORKING_SET_BYTES = 1 << 28
"""Size of the weights that a few rows are multiplied with: as in decode, nothing stays in a
cache until it is read again."""
MOST_MATRICES = 64
"""All matrices are in one program; thousands of tiny ones take gigabytes to compile."""


def rates(config: GriffinConfig, batches: Sequence[int]) -> dict[str, float]:
    """Best of several matrix products (FLOP/s), and of products of as many rows as each
    batch has with weights that come from memory (bytes/s)."""
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    product = jax.jit(jnp.matmul)
    x, w = matrix(ROWS, config.width), matrix(config.width, config.mlp_width)
    flops = 2 * ROWS * w.size / _best_seconds(lambda: product(x, w))

    count = min(WORKING_SET_BYTES // w.nbytes, MOST_MATRICES)
    weights = [matrix(config.width, config.mlp_width) for _ in range(count)]

    @jax.jit
    def read_all(x, weights):
        for w in weights:
            x = jnp.tanh(x @ w)[:, : config.width]
        return x

    measured = {"matmul_flops_per_s": flops}
    for batch in batches:
        seconds = _best_seconds(lambda rows=x[:batch]: read_all(rows, weights))
        measured[f"read_{batch}_rows_bytes_per_s"] = count * w.nbytes / seconds
    return measured


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
        steps_per_s = measured[f"read_{batch}_rows_bytes_per_s"] / moved
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
