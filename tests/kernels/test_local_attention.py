"""The contract of `local_attention`, for every implementation."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.kernels import KVCache, local_attention
from recurrentgemma.kernels.local_attention import (
    IMPLEMENTATIONS,
    cudnn,
    one_query,
    ring,
    splash,
    streamed,
    tokamax,
)
from tests.kernels import definitions
from tests.tolerances import assert_close

ANY_LENGTH = [
    name
    for name in IMPLEMENTATIONS
    if name not in ("one_query", "streamed", "cudnn")
    and (name != "tokamax" or importlib.util.find_spec("tokamax"))
]
"""Implementations that take any chunk, with any window; tokamax where it is installed."""
B, N, K, H = 3, 4, 2, 5
SCALE, SOFT_CAP = 0.7, 2.0
NAMES = ("q", "k", "v")


@pytest.fixture(autouse=True)
def narrow_heads_and_small_blocks(monkeypatch):
    """Interpreted, splash attention takes any head; here, several blocks too."""
    monkeypatch.setattr(splash, "HEAD_MULTIPLE", 1)
    monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)
    monkeypatch.setattr(tokamax, "KERNELS", (tokamax.EMULATION,))
    monkeypatch.setattr(tokamax, "capability", lambda: (8, 0))
    monkeypatch.setattr(streamed, "LEAST_SLOTS", 1)
    monkeypatch.setattr(streamed, "SMALLEST_BLOCK", 24)
    monkeypatch.setattr(streamed, "LARGEST_BLOCK", 48)


def random_positions(length, rng):
    """Rows that begin anywhere, hold several documents, and end in padding."""
    rows = np.full((B, length), -1, np.int32)
    for row, padding in zip(rows, (0, length // 5, length // 2), strict=True):
        position = int(rng.integers(0, 9))
        for t in range(length - padding):
            position = 0 if rng.random() < 3 / length else position + (t > 0)
            row[t] = position
    return rows


def random_inputs(length, seed=0):
    """q, k, v, positions, and the cotangent of out, zero at padding."""
    rng = np.random.default_rng(seed)
    shapes = [(B, length, heads, H) for heads in (N, K, K, N)]
    q, k, v, cotangent = (rng.normal(size=s).astype(np.float32) for s in shapes)
    positions = random_positions(length, rng)
    return q, k, v, positions, cotangent * (positions >= 0)[:, :, None, None]


def empty_cache(slots, dtype=jnp.float32):
    zeros = jnp.zeros((B, slots, K, H), dtype)
    return KVCache(zeros, zeros, jnp.full((B, slots), -1, jnp.int32))


def call(q, k, v, positions, cache, window, implementation, soft_cap=SOFT_CAP):
    return local_attention(
        q,
        k,
        v,
        positions=positions,
        cache=cache,
        window=window,
        scale=SCALE,
        soft_cap=soft_cap,
        implementation=implementation,
    )


def evaluate(attend, q, k, v, cotangent):
    """out, the cache and the gradients by name, of attend(q, k, v) -> out, cache."""

    def loss(q, k, v):
        out, cache = attend(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * cotangent), (out, cache)

    gradients, (out, cache) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    names = (f"grad_{name}" for name in NAMES)
    return {"out": out} | dict(zip(names, gradients, strict=True)), cache


def assert_all_close(actual, expected, positions, dtype="float32"):
    padding = (positions < 0)[:, :, None, None]
    for name, array in actual.items():
        array = np.asarray(array, np.float64)
        assert np.isfinite(array).all(), name
        kind = "gradient" if name.startswith("grad") else "attention"
        assert_close(np.where(padding, 0, array), expected[name], kind, dtype)


def assert_ring_holds(cache, k, v, positions, window):
    """The ring has exactly the last `window` tokens of each row's last document."""
    for b, tokens in enumerate(definitions.ring(positions, window)):
        expected = np.full(window, -1)
        for position in tokens:
            expected[position % window] = position
        np.testing.assert_array_equal(cache.positions[b], expected)
        for position, index in tokens.items():
            slot = position % window
            np.testing.assert_array_equal(cache.keys[b, slot], k[b, index])
            np.testing.assert_array_equal(cache.values[b, slot], v[b, index])


CASES = [
    (1, 20, SOFT_CAP),
    (7, 20, None),
    (128, 20, SOFT_CAP),
    (128, 200, SOFT_CAP),
    (1000, 20, None),
    (700, None, SOFT_CAP),
]
# Interpreted, splash attention is slow, and any length is padded to a block's.
SPLASH_CASES = [(128, 20, SOFT_CAP), (128, 200, None), (200, None, SOFT_CAP)]


@pytest.mark.parametrize(
    "implementation, length, window, soft_cap",
    [
        (implementation, *case)
        for implementation in ANY_LENGTH
        for case in (SPLASH_CASES if implementation == "splash" else CASES)
    ],
)
def test_values_and_gradients(implementation, length, window, soft_cap):
    *qkv, positions, cotangent = random_inputs(length)

    @jax.jit
    def run(q, k, v, positions, cotangent):
        def attend(*qkv):
            return call(*qkv, positions, None, window, implementation, soft_cap)

        return evaluate(attend, q, k, v, cotangent)

    actual, cache = run(*qkv, positions, cotangent)
    expected = definitions.attention(
        *qkv, positions, window, SCALE, soft_cap, cotangent
    )
    assert_all_close(actual, expected, positions)
    assert_ring_holds(cache, *qkv[1:], positions, window or length)


@pytest.fixture
def emulated_cudnn(monkeypatch):
    """XLA's form of the same function, with the same arguments, in float32."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", cudnn.EMULATION)
    monkeypatch.setattr(cudnn, "capability", lambda: (8, 0))
    monkeypatch.setattr(cudnn, "DTYPES", (jnp.float32,))
    monkeypatch.setattr(cudnn, "HEAD_MULTIPLE", 1)
    plain = jax.nn.dot_product_attention

    def emulated(*arrays, is_causal, **options):
        # XLA hides what comes later for the window's sake; cuDNN would show it.
        assert is_causal
        return plain(*arrays, is_causal=is_causal, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", emulated)


@pytest.mark.parametrize("window", [20, None])
def test_cudnn(window, emulated_cudnn):
    """Rows of one document, padded, and rows of several, in one program."""
    length = 50
    *qkv, several, cotangent = random_inputs(length)
    one = np.arange(length)[None] + np.array([[0], [7], [1000]])
    one = np.where(np.arange(length) < [[50], [41], [1]], one, -1).astype(np.int32)
    assert (bool(cudnn.restarts(one)), bool(cudnn.restarts(several))) == (False, True)

    @jax.jit
    def run(q, k, v, positions, cotangent):
        def attend(*qkv):
            return call(*qkv, positions, None, window, "cudnn", None)

        return evaluate(attend, q, k, v, cotangent)

    for positions in (one, several):
        weights = cotangent * (positions >= 0)[:, :, None, None]
        actual, cache = run(*qkv, positions, weights)
        expected = definitions.attention(*qkv, positions, window, SCALE, None, weights)
        assert_all_close(actual, expected, positions)
        assert_ring_holds(cache, *qkv[1:], positions, window or length)


def test_what_cudnn_does_not_take(emulated_cudnn, monkeypatch):
    q, k, v, positions, _ = random_inputs(7)
    for soft_cap, cache, reason in [
        (SOFT_CAP, None, "it has no soft cap"),
        (None, empty_cache(20), "it takes no cache"),
    ]:
        with pytest.raises(NotImplementedError, match=reason):
            call(q, k, v, positions, cache, 20, "cudnn", soft_cap)
    wide = [np.zeros((*array.shape[:3], 256), np.float32) for array in (q, k, v)]
    run = partial(call, *wide, positions, None, 20, "cudnn", None)
    with pytest.raises(NotImplementedError, match="at most 128 on this GPU, not 256"):
        run()
    monkeypatch.setattr(cudnn, "capability", lambda: (9, 0))
    jax.eval_shape(run)
    monkeypatch.setattr(cudnn, "capability", lambda: None)
    with pytest.raises(NotImplementedError, match="there is none here"):
        run()
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="bfloat16 or float16, the same"):
        run()


def test_tokamax_is_no_requirement(monkeypatch):
    """Nor does anything import it before it is used."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    q, k, v, positions, _ = random_inputs(7)
    with pytest.raises(NotImplementedError, match="tokamax is not installed"):
        call(q, k, v, positions, None, 20, "tokamax")
    monkeypatch.undo()
    if "tokamax" in ANY_LENGTH:
        with pytest.raises(NotImplementedError, match="8.0, and none is here"):
            call(q, k, v, positions, None, 20, "tokamax")


def split_rows(arrays, widths, positions):
    """Chunks of each row's sequence, padded on the right, and where they come from.

    widths [chunks][row] are tokens; a chunk is as wide as its widest row.
    """
    starts = [0] * B
    for chunk in widths:
        index = np.full((B, max(chunk)), -1)
        for row, width in enumerate(chunk):
            index[row, :width] = np.arange(starts[row], starts[row] + width)
            starts[row] += width
        parts = [np.take_along_axis(a, index[:, :, None, None], 1) for a in arrays]
        chunk_positions = np.take_along_axis(positions, index, 1)
        yield parts, np.where(index < 0, -1, chunk_positions).astype(np.int32), index


# The first chunk is wider than the window, rows advance unevenly and stand still; the
# document that starts at the second row's token 30 starts in a decode step.
WIDTHS = [(70, 30, 1), (1, 1, 0), (1, 0, 1), (20, 53, 0), (8, 16, 98)]


@pytest.mark.parametrize(
    "implementation, window",
    [
        *((implementation, 24) for implementation in ANY_LENGTH),
        ("reference", None),
        ("blocked", None),
        ("streamed", None),
    ],
)
def test_split_invariance(implementation, window):
    """Any chunks from an empty cache are the whole: values, gradients and the ring."""
    length = 100
    *qkv, _, cotangent = random_inputs(length)
    positions = random_positions(length, np.random.default_rng(1))
    positions[1] = np.r_[np.arange(5, 35), np.arange(70)]
    positions[2, :] = np.arange(100) + 2
    cotangent = np.random.default_rng(2).normal(size=cotangent.shape)
    chunks = list(split_rows(qkv, WIDTHS, positions))
    slots = window or 128

    @jax.jit
    def run(q, k, v):
        def attend(*qkv):
            cache, out = empty_cache(slots), jnp.zeros((B, length, N, H))
            for _, chunk_positions, index in chunks:
                part = (
                    jnp.take_along_axis(array, index[:, :, None, None], 1)
                    for array in qkv
                )
                y, cache = call(*part, chunk_positions, cache, window, implementation)
                rows = np.arange(B)[:, None]
                where = np.where(index < 0, length, index)
                out = out.at[rows, where].set(y, mode="drop")
            return out, cache

        return evaluate(attend, q, k, v, cotangent)

    actual, cache = run(*qkv)
    expected = definitions.attention(
        *qkv, positions, window, SCALE, SOFT_CAP, cotangent
    )
    assert_all_close(actual, expected, positions)
    assert_ring_holds(cache, *qkv[1:], positions, slots)


@pytest.mark.parametrize("implementation", [None, "one_query", *ANY_LENGTH])
def test_decode(implementation):
    """Token by token, far beyond the window, through a restart: as the whole."""
    length, window = 60, 8
    *qkv, _, cotangent = random_inputs(length)
    positions = np.full((B, length), -1, np.int32)
    positions[0] = np.arange(length)
    positions[1] = np.r_[np.arange(20), np.arange(length - 20)]
    positions[2, :30] = np.arange(30) + 100_000_000
    cotangent = cotangent * (positions >= 0)[:, :, None, None]

    @jax.jit
    def run(q, k, v):
        def step(cache, token):
            *qkv, position = (array[:, None] for array in token)
            out, cache = call(*qkv, position, cache, window, implementation)
            return cache, out[:, 0]

        def attend(*qkv):
            tokens = [jnp.swapaxes(array, 0, 1) for array in (*qkv, positions)]
            cache, out = jax.lax.scan(step, empty_cache(window), tuple(tokens))
            return jnp.swapaxes(out, 0, 1), cache

        return evaluate(attend, q, k, v, cotangent)

    actual, cache = run(*qkv)
    expected = definitions.attention(
        *qkv, positions, window, SCALE, SOFT_CAP, cotangent
    )
    assert_all_close(actual, expected, positions)
    assert_ring_holds(cache, *qkv[1:], positions, window)


@pytest.mark.parametrize("joined", [False, True])
def test_decode_to_several_key_heads(joined, monkeypatch):
    """Both forms of the products, on a ring of two key heads; values and gradients."""
    monkeypatch.setattr(one_query, "MOST_JOINED_HEADS", K if joined else 1)
    q, k, v, _, cotangent = random_inputs(1)
    keys, values = random_inputs(9, seed=1)[1:3]
    held = jnp.asarray([[0, 1, 2, 3, 4, -1, -1, -1, -1], [*range(9)], [-1] * 9])
    positions = jnp.asarray([[5], [9], [0]], jnp.int32)

    @partial(jax.jit, static_argnums=0)
    def run(implementation):
        def attend(q, k, v, keys, values):
            cache = KVCache(keys, values, held.astype(jnp.int32))
            out, _ = call(q, k, v, positions, cache, 8, implementation)
            return out

        out, pull_back = jax.vjp(attend, q, k, v, keys, values)
        return out, *pull_back(cotangent)

    for actual, expected in zip(run("one_query"), run("reference"), strict=True):
        assert_close(actual, expected, "gradient")


@pytest.mark.parametrize("length", [2, 9, 24, 40])
def test_writing_in_place_is_writing(length):
    """Rows that continue, restart once or twice, end early, are empty or come round."""
    slots, rng = 24, np.random.default_rng(0)
    old = KVCache(*(rng.normal(size=(6, slots, K, H)) for _ in range(2)), None)
    start = np.array([0, 3, 7, 20, 23, 1000])
    newest = start[:, None] - 1
    held = newest - (newest - np.arange(slots)) % slots
    old = old._replace(positions=jnp.asarray(np.where(held < 0, -1, held), jnp.int32))
    positions = start[:, None] + np.arange(length)
    positions[1, length // 3 :] = np.arange(length - length // 3)
    positions[2, length // 2 :] = np.arange(length - length // 2)
    positions[2, length - 1] = 0
    positions[3, length // 2 :] = -1
    positions[4] = -1
    new = [rng.normal(size=(6, length, K, H)) for _ in range(2)]
    chunk = (*map(jnp.asarray, new), jnp.asarray(positions, jnp.int32))
    old = KVCache(*map(jnp.asarray, old))
    expected, actual = ring.write(old, *chunk), ring.write_in_place(old, *chunk)
    np.testing.assert_array_equal(actual.positions, expected.positions)
    held = np.asarray(expected.positions)[..., None, None] >= 0
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(
            np.where(held, ours, 0), np.where(held, theirs, 0)
        )


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 256])
def test_a_long_ring_is_never_copied(length):
    """Global attention to a donated ring of three key heads: a chunk and a step."""
    slots, heads = 1 << 16, 3
    floats = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    cache = KVCache(
        *[floats((1, slots, heads, 64))] * 2,
        jax.ShapeDtypeStruct((1, slots), jnp.int32),
    )
    new = [floats((1, length, n, 64)) for n in (2 * heads, heads, heads)]
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(cache, *new):
        *qkv, positions = new
        return call(*qkv, positions, cache, None, None)

    compiled = jax.jit(run, donate_argnums=0).lower(cache, *new, positions).compile()
    size = 4 * slots * heads * 64
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2


@pytest.mark.parametrize("length", [1, 30])
@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_gradient_through_the_written_cache(implementation, length):
    """Each token kept passes its slot's gradient on, each token dropped passes none."""
    window = 8
    *qkv, positions, _ = map(jnp.asarray, random_inputs(length))
    positions = jnp.asarray(
        np.where(np.arange(B)[:, None] == 2, -1, np.arange(length)[None] + 3), jnp.int32
    )
    old = random_inputs(window, seed=1)[1:3]
    before = KVCache(
        *map(jnp.asarray, old),
        jnp.asarray([[0, 1, 2, -1, -1, -1, -1, -1]] * B, jnp.int32),
    )
    weights = np.random.default_rng(2).normal(size=(B, window, K, H))

    def loss(k, old_keys):
        cache = before._replace(keys=old_keys)
        _, after = call(qkv[0], k, qkv[2], positions, cache, window, implementation)
        return jnp.sum(after.keys * weights)

    new, kept = jax.jit(jax.grad(loss, (0, 1)))(qkv[1], before.keys)
    expected_new, expected_kept = np.zeros_like(new), np.array(weights)
    for index in range(length):
        slot = (index + 3) % window
        if index >= length - window:
            expected_new[:2, index] = weights[:2, slot]
        expected_kept[:2, slot] = 0
    assert_close(new, expected_new, "gradient")
    assert_close(kept, expected_kept, "gradient")


@pytest.mark.parametrize("implementation", [*ANY_LENGTH, "streamed"])
def test_dtypes(implementation):
    """bfloat16 stays bfloat16, in a chunk and in a decode step; sums are float32."""
    length, window = 128, None if implementation == "streamed" else 24
    slots = window or length
    *qkv, positions, cotangent = random_inputs(length)
    qkv = [jnp.asarray(array, jnp.bfloat16) for array in qkv]

    @jax.jit
    def run(q, k, v):
        def attend(*qkv):
            cache, parts = empty_cache(slots, jnp.bfloat16), []
            for part in (slice(0, 50), slice(50, length - 1), slice(length - 1, None)):
                chunk = (array[:, part] for array in qkv)
                out, cache = call(
                    *chunk, positions[:, part], cache, window, implementation
                )
                parts.append(out)
            return jnp.concatenate(parts, axis=1), cache

        return evaluate(attend, q, k, v, cotangent)

    actual, cache = run(*qkv)
    for name, array in {**actual, "keys": cache.keys, "values": cache.values}.items():
        assert array.dtype == jnp.bfloat16, name
    expected = definitions.attention(
        *qkv, positions, window, SCALE, SOFT_CAP, cotangent
    )
    assert_all_close(actual, expected, positions, "bfloat16")


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_transformations_and_determinism(implementation):
    """vmap of remat, differentiated: as the plain call, and twice the same."""
    window = 24
    *qkv, positions, cotangent = map(jnp.asarray, random_inputs(128))

    @jax.checkpoint
    def row(q, k, v, positions):
        arrays = (array[None] for array in (q, k, v, positions))
        out, cache = call(*arrays, None, window, implementation)
        return jax.tree.map(lambda array: array[0], (out, cache))

    @jax.jit
    def run(q, k, v):
        return evaluate(lambda *qkv: jax.vmap(row)(*qkv, positions), q, k, v, cotangent)

    # Under vmap tokamax traces itself again, and promotes ranks.
    with jax.numpy_rank_promotion("allow" if implementation == "tokamax" else "raise"):
        first, second = run(*qkv), run(*qkv)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    expected = definitions.attention(
        *qkv, positions, window, SCALE, SOFT_CAP, cotangent
    )
    assert_all_close(first[0], expected, positions)


def test_far_positions_change_nothing():
    """Only distances matter: position 1e8 gives the bits of position 7."""
    q, k, v, _, _ = map(jnp.asarray, random_inputs(40))
    run = jax.jit(lambda positions: call(q, k, v, positions, empty_cache(8), 8, None))
    near = jnp.tile(jnp.arange(40, dtype=jnp.int32)[None] + 8, (B, 1))
    far = near + 100_000_000
    (out, cache), (out_far, cache_far) = run(near), run(far)
    np.testing.assert_array_equal(out, out_far)
    np.testing.assert_array_equal(cache.keys, cache_far.keys)
    np.testing.assert_array_equal(cache.positions + 100_000_000, cache_far.positions)


@pytest.mark.slow
def test_memory_is_linear_in_length():
    def temporary_bytes(length):
        def loss(q, k, v, positions):
            return jnp.sum(call(q, k, v, positions, None, 32, None)[0])

        shapes = [
            jax.ShapeDtypeStruct((1, length, heads, H), jnp.float32)
            for heads in (N, K, K)
        ]
        positions = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, positions)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(8192), temporary_bytes(32768)
    assert long < 4.5 * short
    assert long < 32768**2


def test_errors():
    q, k, v, positions, _ = map(jnp.asarray, random_inputs(7))
    good = {
        "positions": positions,
        "cache": None,
        "window": 8,
        "scale": 1.0,
        "soft_cap": None,
    }
    for arrays, changes, message in [
        ((q[:, :0], k, v), {}, "T >= 1"),
        ((q[:, :, :3], k, v), {}, "a divisor of the 3 query heads"),
        ((q, k[:, 1:], v), {}, r"k: expected floating \(3, 7, 2, 5\)"),
        ((q, k, v[..., 1:]), {}, r"v: .* got float32 \(3, 7, 2, 4"),
        ((q, k, v.astype(jnp.int32)), {}, "v: expected floating .* got int32"),
        (
            (q, k, v),
            {"positions": positions[:, 1:]},
            r"positions: expected int32 \(3, 7",
        ),
        ((q, k, v), {"window": 0}, "window: expected an integer from 1 to .*, got 0"),
        ((q, k, v), {"cache": empty_cache(7)}, "at least 8 slots.* got 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            local_attention(*arrays, **{**good, **changes})
    with pytest.raises(
        NotImplementedError, match="expected one of blocked, cudnn, one_query, ref"
    ):
        local_attention(q, k, v, **good, implementation="fastest")
    with pytest.raises(NotImplementedError, match="takes no window, not one of 8"):
        local_attention(q, k, v, **good, implementation="streamed")
    step = {**good, "positions": positions[:, :1], "cache": empty_cache(8)}
    with pytest.raises(NotImplementedError, match="got 'fastest'"):
        local_attention(
            *(x[:, :1] for x in (q, k, v)), **step, implementation="fastest"
        )
    with pytest.raises(NotImplementedError, match="takes one query a row, not 7"):
        local_attention(q, k, v, **good, implementation="one_query")


@pytest.mark.parametrize(("name", "loops"), [("blocked", 1), ("one_query", 0)])
def test_a_name_is_meant_for_one_token_too(name, loops):
    q, k, v, positions, _ = map(jnp.asarray, random_inputs(1))

    @jax.jit
    def run(q, k, v):
        return call(q, k, v, positions, empty_cache(8), 8, name)

    assert run.lower(q, k, v).as_text().count("stablehlo.while") == loops


def test_splash_under_a_mesh():
    """Rows over "data"; heads stay together on every device of "model"."""
    *qkv, positions, cotangent = random_inputs(128)
    expected = definitions.attention(*qkv, positions, 20, SCALE, SOFT_CAP, cotangent)
    devices = np.array(jax.devices()[:6]).reshape(3, 2)
    with jax.set_mesh(jax.sharding.Mesh(devices, ("data", "model"))):

        @jax.jit
        def run(q, k, v, positions):
            return call(q, k, v, positions, None, 20, "splash")[0]

        arrays = (*map(jnp.asarray, qkv), jnp.asarray(positions))
        out = run(*arrays)
        lowered = run.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert_all_close({"out": out}, expected, positions)
    assert lowered.count("@tpu_custom_call") == 1


def test_splash_says_why_it_cannot_run(monkeypatch):
    monkeypatch.undo()
    q, k, v, positions, _ = map(jnp.asarray, random_inputs(7))
    for wide, message in [
        (lambda x: x, "splash cannot run: heads of 5 channels are no multiple of 128"),
        (lambda x: jnp.zeros((*x.shape[:3], 128), jnp.float16), "not float16"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            call(wide(q), wide(k), wide(v), positions, None, 8, "splash")
