"""What a model costs as its text grows: prefill and decode speed, bytes of the cache.

A model with random weights reads random tokens. Before each length it stops: it reads
one more chunk, which is timed, and writes the last tokens. Each figure is the best of
some rounds, which other work on the machine disturbs least.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from recurrentgemma import cost
from recurrentgemma.benchmarks import device
from recurrentgemma.benchmarks.models import random_model
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.griffin import Griffin

__all__ = ["Point", "card", "curve", "random_model"]

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


def card(model: Griffin, tokens: int) -> dict[str, str]:
    """The model's sizes after so many tokens, and where it runs; for a table.

    Args:
      model: the model.
      tokens: tokens consumed; only global attention's cache depends on it.
    """
    config, dtype = model.config, model.runtime.dtype
    sizes = {"dtype": dtype, "capacity": tokens}
    return {
        "parameters": f"{cost.num_parameters(config):,}",
        "parameter bytes": f"{cost.parameter_bytes(config, dtype):,}",
        f"cache bytes at {tokens:,} tokens": f"{cost.cache_bytes(config, **sizes):,}",
        "bytes that a decode step must read": f"{cost.decode_bytes(config, **sizes):,}",
        "dtype": dtype.name,
        "device": f"{jax.default_backend()}: {device.name()}",
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
        chunk, before, read = tokens[start:end], prefix, end
        prefix = sampler.prefill(chunk, prefix=before)
        prefill = partial(sampler.prefill, chunk, prefix=before)
        prefill_s = _least_seconds(prefill, rounds)
        write = partial(sampler, [[]], prefix=prefix, end_tokens=[])
        # Whatever a call costs once cancels.
        decode_s = _least_seconds(partial(write, max_new_tokens=WRITTEN_TOKENS), rounds)
        decode_s -= _least_seconds(partial(write, max_new_tokens=1), rounds)
        speeds = len(chunk) / prefill_s, (WRITTEN_TOKENS - 1) / decode_s
        points.append(Point(length, *speeds, prefix.num_bytes))
    return points


def _least_seconds(run: Callable[[], Any], rounds: int) -> float:
    run()  # compiles
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(getattr(run(), "cache", None))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
