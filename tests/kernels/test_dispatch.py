"""The platform compiled for, not the one that traces, picks the implementation."""

import jax
import jax.numpy as jnp
import pytest

from recurrentgemma.kernels import linear_scan, local_attention, rg_lru

PLATFORMS = ["cpu", "cuda", "tpu"]


def lowered(function, *arrays, platform):
    traced = jax.jit(function).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_scan_default_follows_the_platform(platform):
    array = jnp.ones((1, 100, 3))
    loops = {"cpu": 1, "cuda": 3, "tpu": 0}
    text = lowered(linear_scan, array, array, platform=platform)
    assert text.count("stablehlo.while") == loops[platform]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_gradients_lower_everywhere(platform):
    """Matrix products take bfloat16 wherever the platform has them."""
    q, k = jnp.ones((1, 8, 2, 4), jnp.bfloat16), jnp.ones((1, 8, 1, 4), jnp.bfloat16)
    positions = jnp.arange(8, dtype=jnp.int32)[None]

    def loss(q, k, a_param):
        out, _ = local_attention(
            q,
            k,
            k,
            positions=positions,
            cache=None,
            window=4,
            scale=1.0,
            soft_cap=None,
        )
        x = out.reshape(1, 8, 8)
        y, _ = rg_lru(x, x, x, a_param, positions)
        return jnp.sum(y.astype(jnp.float32))

    text = lowered(jax.grad(loss, (0, 1, 2)), q, k, jnp.ones(8), platform=platform)
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    for line in products:
        assert ("bf16" in line) == (platform != "cpu"), line
