"""The real TPU compiler takes local attention's kernels, forward and backward.

Needs the extra `tpu-plan` (libtpu); no TPU.
"""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import pytest

from recurrentgemma.benchmarks import ahead_of_time
from recurrentgemma.kernels import KVCache, local_attention

if importlib.util.find_spec("libtpu") is None:
    pytest.skip(
        "needs libtpu: pip install 'recurrentgemma[tpu-plan]'", allow_module_level=True
    )

for name, value in ahead_of_time.ENVIRONMENT.items():
    os.environ.setdefault(name, value)

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


@pytest.mark.parametrize("generation", ahead_of_time.CHIPS)
@pytest.mark.parametrize("case", CASES)
def test_it_compiles(case, generation):
    """By default, without T x T scores; the derivative computes the output again."""
    shapes, options = inputs(CASES[case])

    def attend(q, k, v, positions, cache):
        out, _ = local_attention(q, k, v, positions=positions, cache=cache, **options)
        return out

    def gradients(q, k, v, positions, cache):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v, positions, cache).astype(jnp.float32))

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    batch, length, heads = CASES[case][:3]
    scores_bytes = 4 * batch * heads * length * length
    for function, kernels in ((attend, {"fwd"}), (gradients, {"fwd", "dq", "dkv"})):
        # Not of the compiled program: with a cache its text breaks for v5p and v6e.
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
        named = re.findall(r'kernel_name = "splash_m\w\w_(\w+?)_', lowered.as_text())
        assert set(named) == kernels
        compiled = ahead_of_time.compile_for(generation, function, *shapes)
        if length > 1024:
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            assert temporaries < scores_bytes / 2
