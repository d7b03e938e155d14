"""Ops on a sequence that is cut along time give the numbers of one device, in both
directions of the gradient."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.kernels import KVCache, linear_scan, local_attention, rg_lru
from tests.kernels import definitions
from tests.tolerances import assert_close

B, T, D = 2, 32, 6
N, K, H = 4, 2, 5
SHARDS = 4


@pytest.fixture
def mesh():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, SHARDS), ("data", "sequence"), axis_types=kinds)
    with jax.set_mesh(mesh):
        yield mesh


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def weighted_sum(results, cotangents):
    return sum(
        jnp.sum(result.astype(jnp.float32) * cotangent)
        for result, cotangent in zip(results, cotangents, strict=True)
    )


def evaluate(op, arguments, cotangents, differentiated):
    """Results, and gradients of the arguments at these places."""

    @jax.jit
    def run(*arguments):
        def loss(*arguments):
            results = op(*arguments)
            return weighted_sum(results, cotangents), results

        return jax.grad(loss, differentiated, has_aux=True)(*arguments)

    return run(*arguments)


@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan(mesh, reverse):
    rng = np.random.default_rng(0)
    x, y_cotangent = normal(rng, B, T, D), normal(rng, B, T, D)
    a = rng.uniform(-0.6, 1.05, x.shape).astype(np.float32)
    a[rng.random(a.shape) < 0.05] = 0.0
    h0, last_cotangent = normal(rng, B, D), normal(rng, B, D)

    def op(x, a, h0):
        return linear_scan(x, a, h0, reverse=reverse)

    cotangents = (y_cotangent, last_cotangent)
    gradients, (y, h_last) = evaluate(op, (x, a, h0), cotangents, (0, 1, 2))
    expected = definitions.linear_scan(x, a, h0, *cotangents, reverse=reverse)
    assert_close(y, expected["y"], "scan")
    assert_close(h_last, expected["h_last"], "scan")
    for name, gradient in zip("xa", gradients, strict=False):
        assert_close(gradient, expected[f"grad_{name}"], "gradient")
    assert_close(gradients[2], expected["grad_h0"], "gradient")


def test_what_is_whole_stays_in_its_shards(mesh):
    """No device gathers the sequence, and every one runs the op once."""
    x = jnp.ones((B, T, D))
    compiled = jax.jit(lambda x: linear_scan(x, x)).lower(x).compile()
    y, h_last = compiled(x)
    assert y.sharding.shard_shape(y.shape) == (B // 2, T // SHARDS, D)
    assert_close(y[0, :, 0], np.arange(1, T + 1), "scan")
    assert_close(h_last, np.full((B, D), T), "scan")
    text = compiled.as_text()
    assert not re.findall(rf"{T},{D}[^=]* all-gather", text)
    assert len(re.findall(r" while\(", text)) == 2  # over tokens, over shards


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rg_lru(mesh, dtype):
    """Documents start and rows are held anywhere, at the edges of shards too."""
    rng = np.random.default_rng(1)
    x, r, i, y_cotangent = (normal(rng, B, T, D) for _ in range(4))
    a_param = rng.uniform(-9, 1, D).astype(np.float32)
    positions = np.tile(np.arange(T, dtype=np.int32) + 3, (B, 1))
    positions[0, [8, 13, 23]] = 0
    positions[1, 15:18] = -1
    h0, last_cotangent = normal(rng, B, D), normal(rng, B, D)
    x, r, i = (jnp.asarray(array, dtype) for array in (x, r, i))

    def op(*arguments):
        return rg_lru(*arguments)

    arguments, cotangents = (
        (x, r, i, a_param, positions, h0),
        (y_cotangent, last_cotangent),
    )
    gradients, (y, h_last) = evaluate(op, arguments, cotangents, (0, 1, 2, 3, 5))
    expected = definitions.rg_lru(*arguments, *cotangents)
    assert y.dtype == dtype
    assert_close(y, expected["y"], "scan", dtype)
    assert_close(h_last, expected["h_last"], "scan")
    names = ("x", "recurrence_logits", "input_logits", "a_param", "h0")
    for name, gradient in zip(names, gradients, strict=True):
        assert_close(gradient, expected[f"grad_{name}"], "gradient", dtype)


def attention_inputs():
    """Packed documents over the edges of shards, and a row that ends in the second."""
    rng = np.random.default_rng(2)
    q, cotangent = normal(rng, B, T, N, H), normal(rng, B, T, N, H)
    k, v = normal(rng, B, T, K, H), normal(rng, B, T, K, H)
    positions = np.full((B, T), -1, np.int32)
    positions[0] = np.r_[np.arange(5, 12), np.arange(14), np.arange(11)]
    positions[1, :13] = np.arange(5, 18)
    cotangent *= (positions >= 0)[:, :, None, None]
    return (q, k, v), positions, cotangent


def cache_of(slots):
    """A ring that has seen positions 0 to 4 of each row."""
    rng = np.random.default_rng(3)
    keys, values = normal(rng, B, slots, K, H), normal(rng, B, slots, K, H)
    held = np.full((B, slots), -1, np.int32)
    held[:, np.arange(5) % slots] = np.arange(5)
    return KVCache(*map(jnp.asarray, (keys, values, held)))


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("window", [5, 20, None])
def test_local_attention(mesh, window, with_cache):
    """A window within a shard of 8, over three of them, and over everything."""
    qkv, positions, cotangent = attention_inputs()
    cache = cache_of(window or 64) if with_cache else None
    slots = window or (64 if with_cache else T)
    ring_cotangents = [
        normal(np.random.default_rng(4), B, slots, K, H) for _ in range(2)
    ]

    def run(function, **options):
        def op(q, k, v, cached):
            before = cache and KVCache(*cached, cache.positions)
            out, after = function(
                q,
                k,
                v,
                positions=positions,
                cache=before,
                window=window,
                scale=0.7,
                soft_cap=2.0,
                **options,
            )
            held = (after.positions >= 0)[:, :, None, None]
            out = jnp.where((positions >= 0)[:, :, None, None], out, 0)
            kept = [jnp.where(held, array, 0) for array in after[:2]]
            return out, *kept, after.positions

        cached = tuple(cache[:2]) if cache else ()
        cotangents = (cotangent, *ring_cotangents, 0)
        places = (0, 1, 2, 3) if cache else (0, 1, 2)
        return evaluate(op, (*qkv, cached), cotangents, places)

    gradients, (*arrays, held) = run(local_attention)
    one_device = jax.sharding.AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(one_device):
        true_gradients, (*true_arrays, true_held) = run(
            local_attention, implementation="reference"
        )
    np.testing.assert_array_equal(held, true_held)
    for actual, expected in zip(arrays, true_arrays, strict=True):
        assert_close(actual, expected, "attention")
    flat, true_flat = map(jax.tree.leaves, (gradients, true_gradients))
    for actual, expected in zip(flat, true_flat, strict=True):
        assert_close(actual, expected, "gradient")


@pytest.mark.parametrize("length", [1, 30])
def test_a_length_that_does_not_divide_is_whole(mesh, length):
    x = jnp.ones((B, length, D))
    y, h_last = jax.jit(linear_scan)(x, x)
    assert_close(y[0, :, 0], np.arange(1, length + 1), "scan")
    assert_close(h_last, np.full((B, D), length), "scan")


def test_implementations_by_name(mesh):
    x = jnp.full((B, T, D), 0.5)
    y, _ = jax.jit(partial(linear_scan, implementation="associative"))(x, x)
    assert_close(y, linear_scan(x, x)[0], "scan")
    with pytest.raises(NotImplementedError, match="got 'fastest'"):
        linear_scan(x, x, implementation="fastest")
