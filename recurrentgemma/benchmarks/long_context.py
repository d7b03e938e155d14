"""What a model costs as its text grows: prefill and decode speed, bytes of the cache.

A model with random weights reads random tokens. At each length of a doubling series it
has read all but the last few tokens, which it then writes; the next length reads on
from there. Decode is the difference between writing all of these tokens and writing
one: whatever a call costs once cancels. Each figure is the best of some rounds, which
other work on the machine disturbs least.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from recurrentgemma import cost
from recurrentgemma.benchmarks.provenance import device_name
from recurrentgemma.checkpoints.parameters import named_parameters, parameter_dtype
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.griffin import Griffin

WRITTEN_TOKENS = 65
"""Tokens written at each length; the last 64 are timed."""
CHUNK_TOKENS = 1024
"""Tokens of the largest chunk that prefill reads at once."""


@dataclasses.dataclass(frozen=True)
class Point:
    """The figures at one length."""

    tokens: int
    """Tokens consumed at the end: read and written."""
    prefill_tokens_per_s: float
    """Speed of reading the tokens since the previous length."""
    decode_tokens_per_s: float
    """Speed of writing the last tokens, at batch 1."""
    cache_bytes: int
    """Bytes of the cache."""


def random_model(config: GriffinConfig, runtime: Runtime = Runtime()) -> Griffin:
    """A model with random weights in the dtypes of inference, as `load` would give."""
    model = Griffin(config, rngs=nnx.Rngs(0), runtime=runtime)
    leaves = [
        leaf.astype(parameter_dtype(name, runtime))
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


def curve(model: Griffin, lengths: Sequence[int], *, rounds: int = 3) -> list[Point]:
    """Prefill and decode speed and the cache's size at each length.

    Args:
      model: the model; what it writes does not matter.
      lengths: tokens consumed at each point: 1024, then each twice the one before, so
        that the cache of global attention is full at each.
      rounds: how often each figure is taken.

    Raises:
      ValueError: the lengths are other ones.
    """
    expected = [CHUNK_TOKENS << i for i in range(len(lengths))]
    if not lengths or list(lengths) != expected:
        raise ValueError(
            f"lengths: expected {CHUNK_TOKENS}, then each twice the one before, got "
            f"{list(lengths)}"
        )
    sampler = Sampler(model, compile_ahead=False)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, lengths[-1]).tolist()
    points, prefix, read = [], None, 0
    for length in lengths:
        text, read = tokens[read : length - WRITTEN_TOKENS], length - WRITTEN_TOKENS
        prefix, seconds = _read(sampler, text, prefix, rounds)
        decode = _decode_tokens_per_s(sampler, prefix, rounds)
        points.append(Point(length, len(text) / seconds, decode, prefix.num_bytes))
    return points


def _read(
    sampler: Sampler, text: list[int], prefix: Prefix | None, rounds: int
) -> tuple[Prefix, float]:
    """The prefix after a text, and the seconds that reading it took."""

    def read(text: list[int]) -> Prefix:
        result = sampler.prefill(text, prefix=prefix)
        jax.block_until_ready(result.cache)
        return result

    # The first chunk compiles all that the text needs: the cache grows there.
    result = read(text[:CHUNK_TOKENS])
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = read(text)
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


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
