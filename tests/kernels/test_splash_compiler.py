"""The real TPU compiler takes local attention's kernels, forward and backward.

Needs the extra `tpu-plan` (libtpu); no TPU.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest

from recurrentgemma.benchmarks import ahead_of_time
from recurrentgemma.checkpoints.parameters import describe
from recurrentgemma.config import PRESETS, Runtime
from recurrentgemma.kernels import KVCache, local_attention

if importlib.util.find_spec("libtpu") is None:
    pytest.skip(
        "needs libtpu: pip install 'recurrentgemma[tpu-plan]'", allow_module_level=True
    )

for name, value in ahead_of_time.ENVIRONMENT.items():
    os.environ.setdefault(name, value)

# The benchmarks have no row of v4; its kernels have as little memory as any.
ahead_of_time.CHIPS.setdefault("v4", ahead_of_time.Chip("v4:2x2x1", 1.05e9, 1228e9))
GENERATIONS = ("v4", "v5e", "v5p", "v6e")

# Batch, tokens, query heads, key heads, head dim, window, slots, soft cap and dtype.
CASES = {
    "prefill_2b": (1, 1024, 10, 1, 256, 2048, 2048, None, "bfloat16"),
    "short_chunk_2b": (2, 16, 10, 1, 256, 2048, 2048, None, "bfloat16"),
    "train_2b": (8, 2048, 10, 1, 256, 2048, 0, None, "bfloat16"),
    "train_9b": (1, 8192, 16, 1, 256, 2048, 0, None, "bfloat16"),
    "gemma2_2b": (1, 1024, 8, 4, 256, 4095, 4095, 50.0, "bfloat16"),
    "transformer": (1, 4096, 16, 1, 128, None, 0, None, "float32"),
}


def inputs(case):
    """Shapes of q, k, v, positions and the cache, and the options."""
    batch, length, heads, key_heads, size, window, slots, soft_cap, dtype = case

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    keys, ring = array(length, key_heads, size), array(slots, key_heads, size)
    cache = KVCache(ring, ring, array(slots, dtype=jnp.int32)) if slots else None
    shapes = (
        array(length, heads, size),
        keys,
        keys,
        array(length, dtype=jnp.int32),
        cache,
    )
    return shapes, {"window": window, "scale": size**-0.5, "soft_cap": soft_cap}


BY_DEFAULT = {("train_2b", "v4"), ("gemma2_2b", "v6e"), ("transformer", "v5e")}
"""The least memory; a ring, a soft cap and several key heads; float32."""


@pytest.mark.parametrize(
    ("case", "generation"),
    [
        pytest.param(*pair, marks=[] if pair in BY_DEFAULT else pytest.mark.slow)
        for pair in itertools.product(CASES, GENERATIONS)
    ],
)
def test_it_compiles(case, generation):
    """By default, without T x T scores; each kernel runs once in a gradient."""
    shapes, options = inputs(CASES[case])

    def attend(q, k, v, positions, cache):
        out, _ = local_attention(q, k, v, positions=positions, cache=cache, **options)
        return out

    def gradients(q, k, v, positions, cache):
        def loss(q, k, v):
            out = attend(q, k, v, positions, cache)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    batch, length, heads = CASES[case][:3]
    scores_bytes = 4 * batch * heads * length * length
    for function, kernels in ((attend, ["fwd"]), (gradients, ["dkv", "dq", "fwd"])):
        # Not of the compiled program: with a cache its text breaks for v5p and v6e.
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
        text = lowered.as_text()
        found = re.findall(r'kernel_name = "splash_m\w\w_([a-z]+)_', text)
        assert sorted(found) == kernels
        compiled = ahead_of_time.compile_for(generation, function, *shapes)
        if length > 1024:
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            assert temporaries < scores_bytes / 2


def test_an_attention_block_copies_no_queries():
    """Its projections write and read them in the order of the kernel."""
    config = dataclasses.replace(
        PRESETS["nano"],
        num_heads=4,
        head_dim=128,
        num_layers=1,
        block_pattern=("local_attention",),
    )
    model = describe(config, Runtime(compute_dtype="bfloat16"))
    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    compiled = ahead_of_time.compile_for(
        "v5e", lambda model, tokens: model(tokens)[0], model, tokens
    )
    text = compiled.as_text()
    assert "splash_mqa_fwd" in text
    copied = re.findall(r" = \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    sizes = {math.prod(map(int, shape.split(","))) for shape in copied}
    assert math.prod(tokens.shape) * config.num_heads * config.head_dim not in sizes
