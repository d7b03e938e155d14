"""What a model costs as its text grows: prefill and decode speed, bytes of the cache.

A model with random weights reads random tokens. Before each length it stops: it reads
one more chunk, which is timed, and writes the last tokens. Decode is the difference
between writing all of these tokens and writing one: whatever a call costs once cancels.
Each figure is the best of some rounds, which other work on the machine disturbs least.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from recurrentgemma import cost
from recurrentgemma.benchmarks.report import device_name
from recurrentgemma.checkpoints.parameters import named_parameters, parameter_dtype
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.griffin import Griffin

WRITTEN_TOKENS = 65
"""Tokens written at each length; the last 64 are timed."""
CHUNK_TOKENS = 1024
"""Tokens that are read while prefill is timed: one program runs once."""


@dataclasses.dataclass(frozen=True)
class Point:
    """The figures at one length."""

    tokens: int
    """Tokens consumed at the end: read and written."""
    prefill_tokens_per_s: float
    """Speed of reading the last 1024 tokens before those that are written."""
    decode_tokens_per_s: float
    """Speed of writing the last tokens, at batch 1."""
    cache_bytes: int
    """Bytes of the cache."""


def random_model(config: GriffinConfig, runtime: Runtime = Runtime()) -> Griffin:
    """A model with random weights in the dtypes of inference, as `load` would give."""
    model = Griffin(config, rngs=nnx.Rngs(0), runtime=runtime)
    leaves = [
        leaf.astype(parameter_dtype(name, config, runtime))
        for name, leaf in named_parameters(model).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def card(model: Griffin, tokens: int) -> dict[str, str]:
    """The model's sizes after so many tokens, and where it runs; for a table.

    Args:
      model: the model.
      tokens: tokens consumed; only global attention's cache depends on it.
    """
    config, dtype = model.config, model.runtime.dtype
    sizes = {"dtype": dtype, "capacity": tokens}
    device = jax.devices()[0]
    name = device_name() if device.platform == "cpu" else device.device_kind
    return {
        "parameters": f"{cost.num_parameters(config):,}",
        "parameter bytes": f"{cost.parameter_bytes(config, dtype):,}",
        f"cache bytes at {tokens:,} tokens": f"{cost.cache_bytes(config, **sizes):,}",
        "bytes that a decode step must read": f"{cost.decode_bytes(config, **sizes):,}",
        "dtype": dtype.name,
        "device": f"{device.platform}: {name}",
    }


def curve(model: Griffin, lengths: Sequence[int], *, rounds: int = 5) -> list[Point]:
    """Prefill and decode speed and the cache's size at each length.

    Args:
      model: the model; what it writes does not matter.
      lengths: tokens consumed at each point, each at least 1024 more than the one
        before. The cache of global attention holds a power of two of tokens: it is full
        at these lengths.
      rounds: how often each figure is taken.

    Raises:
      ValueError: the lengths are too close to each other or to 0.
    """
    steps = np.diff([0, *lengths])
    if len(steps) == 0 or min(steps) < CHUNK_TOKENS:
        raise ValueError(
            f"lengths: expected at least one, each at least {CHUNK_TOKENS} more than "
            f"the one before, got {list(lengths)}"
        )
    sampler = Sampler(model, compile_ahead=False)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, lengths[-1]).tolist()
    points, prefix, read = [], None, 0
    for length in lengths:
        end = length - WRITTEN_TOKENS
        start = max(end - CHUNK_TOKENS, 0)
        if start > read:
            prefix = sampler.prefill(tokens[read:start], prefix=prefix)
        prefix, prefill = _read(sampler, tokens[start:end], prefix, rounds)
        read = end
        decode = _decode_tokens_per_s(sampler, prefix, rounds)
        points.append(Point(length, prefill, decode, prefix.num_bytes))
    return points


def _read(
    sampler: Sampler, chunk: list[int], before: Prefix | None, rounds: int
) -> tuple[Prefix, float]:
    """The prefix after a chunk, and the tokens/s of reading it."""

    def read() -> tuple[Prefix, float]:
        start = time.perf_counter()
        prefix = sampler.prefill(chunk, prefix=before)
        jax.block_until_ready(prefix.cache)
        return prefix, time.perf_counter() - start

    prefix, _ = read()  # compiles
    return prefix, len(chunk) / min(read()[1] for _ in range(rounds))


def _decode_tokens_per_s(sampler: Sampler, prefix: Prefix, rounds: int) -> float:
    def seconds(count: int) -> float:
        start = time.perf_counter()
        sampler([[]], prefix=prefix, max_new_tokens=count, end_tokens=[])
        return time.perf_counter() - start

    seconds(WRITTEN_TOKENS)  # compiles
    best = {
        count: min(seconds(count) for _ in range(rounds))
        for count in (WRITTEN_TOKENS, 1)
    }
    return (WRITTEN_TOKENS - 1) / (best[WRITTEN_TOKENS] - best[1])
