"""What runs on a GPU without a kernel: few steps that wait for each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.kernels import linear_scan, local_attention, rg_lru
from recurrentgemma.kernels.linear_scan import linear_scan_gradients
from recurrentgemma.kernels.local_attention import blocked
from recurrentgemma.kernels.rg_lru import composed
from recurrentgemma.kernels.rg_lru.gates import Inputs
from tests.kernels import definitions
from tests.kernels.loops import turns
from tests.tolerances import assert_close

LENGTH = 8192
MOST_TURNS = 32


def shape(*dims, dtype="float32"):
    return jax.ShapeDtypeStruct(dims, dtype)


X, STATE = shape(1, LENGTH, 256), shape(1, 256)
LOGITS = (X, X, X, shape(256), shape(1, LENGTH, dtype="int32"), STATE)
CHUNKED = {"implementation": "chunked"}


def rg_lru_gradients(*arrays):
    *inputs, y, y_gradient, last_gradient = arrays
    arguments, upstream = (Inputs(*inputs),), (y_gradient, last_gradient)
    return composed.gradients(arguments, (y, None), upstream, linear_scan="chunked")


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (partial(linear_scan, **CHUNKED), (X, X, STATE)),
        (partial(linear_scan, **CHUNKED, reverse=True), (X, X, STATE)),
        (partial(linear_scan_gradients, **CHUNKED), (X, STATE, X, X, STATE)),
        (partial(rg_lru, linear_scan="chunked"), LOGITS),
        (rg_lru_gradients, (*LOGITS, X, X, STATE)),
    ],
)
def test_the_recurrence_has_no_loop(function, shapes):
    assert turns(function, *shapes, platform="cuda") == 0


def attention(q, k, v, positions, window=2048):
    return local_attention(
        *(q, k, v),
        positions=positions,
        cache=None,
        window=window,
        scale=0.5,
        soft_cap=None,
        implementation="blocked",
    )[0]


def test_attention_has_large_blocks_on_gpu_alone():
    q, k = shape(1, LENGTH, 10, 64), shape(1, LENGTH, 1, 64)
    arguments = q, k, k, shape(1, LENGTH, dtype="int32")

    def backward(*arguments):
        return jax.grad(lambda *a: jnp.sum(attention(*a)), (0, 1, 2))(*arguments)

    count = partial(turns, attention)
    assert (
        count(*arguments, platform="cuda") == LENGTH // blocked.GPU_BLOCK <= MOST_TURNS
    )
    assert count(*arguments, platform="cpu") == LENGTH // 128
    both = turns(backward, *arguments, platform="cuda")
    assert both == 2 * LENGTH // blocked.GPU_BLOCK <= MOST_TURNS


@pytest.mark.parametrize("rows", [1, 10, 80, 640])
@pytest.mark.parametrize(("front", "window"), [(0, 2048), (2048, 2048), (4096, None)])
def test_blocks_on_gpu_are_bounded(front, window, rows):
    """By queries and by scores, unless the smallest block has more."""
    least = blocked.block_size(LENGTH, window)
    block = blocked.gpu_block_size(LENGTH, front, window, rows, least=least)
    assert least <= block <= blocked.GPU_BLOCK
    keys = front + LENGTH if window is None else window + block
    assert block == least or rows * block * keys <= blocked.GPU_SCORES
    assert (
        block == blocked.GPU_BLOCK or 2 * rows * block * keys > blocked.GPU_SCORES / 2
    )


def test_large_blocks_give_the_same_numbers(monkeypatch):
    """What a GPU runs, here on CPU: several blocks, documents and padding in them."""
    length, window = 700, 90
    rng = np.random.default_rng(0)
    q, upstream = rng.normal(size=(2, 2, length, 4, 5)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, 2, 5)).astype(np.float32)
    positions = np.stack([np.arange(length), np.r_[np.arange(300), np.arange(400)]])
    positions[1, 650:] = -1
    upstream[1, 650:] = 0
    positions = positions.astype(np.int32)
    large = blocked.gpu_block_size(length, 0, window, 8, least=64)
    assert large == blocked.GPU_BLOCK
    monkeypatch.setattr(blocked, "block_size", lambda *_: large)

    @jax.jit
    def run(*qkv):
        attend = partial(attention, positions=positions, window=window)
        out, pull_back = jax.vjp(attend, *qkv)
        return out, *pull_back(upstream)

    out, *gradients = run(q, k, v)
    expected = definitions.attention(q, k, v, positions, window, 0.5, None, upstream)
    filled = (positions >= 0)[:, :, None, None]
    assert_close(np.where(filled, out, 0), expected["out"], "attention")
    for name, gradient in zip("qkv", gradients, strict=True):
        assert_close(gradient, expected[f"grad_{name}"], "gradient")
