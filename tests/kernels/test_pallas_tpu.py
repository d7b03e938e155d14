"""The TPU kernels of the recurrence beyond the contract: blocks, races, choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from recurrentgemma.kernels import linear_scan, rg_lru
from recurrentgemma.kernels.linear_scan import block_sizes, workloads
from recurrentgemma.kernels.linear_scan import pallas_tpu as scan_kernels
from recurrentgemma.kernels.rg_lru import pallas_tpu as rg_lru_kernels
from tests.kernels import definitions
from tests.tolerances import assert_close

B, T, D = 4, 27, 140
"""With small blocks: several of rows, of time and of channels, the last ones partial."""


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_sizes, "MAX_WIDTH", 128)
    monkeypatch.setattr(block_sizes, "ROW_CHANNELS", 256)
    monkeypatch.setattr(block_sizes, "MAX_STEPS", 16)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def interpret(capfd):
    """An interpretation that looks for races and for memory that nobody wrote."""
    pltpu.reset_tpu_interpret_mode_state()
    yield pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", random_seed=3
    )
    assert "RACE DETECTED" not in capfd.readouterr().out


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_all_close(actual, expected):
    for name, array in actual.items():
        kind = "gradient" if name.startswith("grad") else "scan"
        assert_close(array, expected[name], kind)


def test_scan_over_many_blocks(small_blocks, interpret):
    x, y_gradient = random(2, B, T, D)
    h0, last_gradient = random(2, B, D)
    a = np.random.default_rng(1).uniform(-0.6, 1.05, x.shape).astype(np.float32)
    sizes = block_sizes.block_sizes(x.shape, (4, 4, 4))
    assert sizes == (2, 16, 128, 8)

    expected = definitions.linear_scan(x, a, h0, y_gradient, last_gradient)
    y, h_last = scan_kernels.scan(x, a, h0, reverse=False, interpret=interpret)
    names = ("grad_x", "grad_a", "grad_h0")
    gradients = scan_kernels.gradients(
        a, h0, y, y_gradient, last_gradient, interpret=interpret
    )
    actual = dict(zip(names, gradients, strict=True)) | {"y": y, "h_last": h_last}
    assert_all_close(actual, expected)

    y, h_last = scan_kernels.scan(x, a, h0, reverse=True, interpret=True)
    expected = definitions.linear_scan(x, a, h0, x, h0, reverse=True)
    assert_all_close({"y": y, "h_last": h_last}, expected)


def test_rg_lru_over_many_blocks(small_blocks, interpret):
    x, recurrence, input_, y_gradient = random(4, B, T, D)
    h0, last_gradient = random(2, B, D)
    a_param = np.linspace(-9, 1, D, dtype=np.float32)
    positions = np.arange(T, dtype=np.int32)[None] + np.array([[0], [1], [5], [9]])
    positions = positions.astype(np.int32)
    positions[1, 7], positions[2, 9:], positions[3, 16:19] = 0, -1, [-1, -1, 0]
    rows = np.broadcast_to(a_param, (B, D))
    arguments = (x, recurrence, input_, rows, positions, h0)

    expected = definitions.rg_lru(
        *arguments[:3], a_param, positions, h0, y_gradient, last_gradient
    )
    y, h_last = rg_lru_kernels.recurrence(*arguments, interpret=interpret)
    gradients = rg_lru_kernels.gradients(
        *arguments, y, y_gradient, last_gradient, interpret=interpret
    )
    names = ("x", "recurrence_logits", "input_logits", "a_param", "h0")
    actual = {f"grad_{n}": g for n, g in zip(names, gradients, strict=True)}
    actual["grad_a_param"] = actual["grad_a_param"].sum(0)
    assert_all_close(actual | {"y": y, "h_last": h_last}, expected)


def test_block_sizes_fit():
    shapes = [*workloads.WORKLOADS.values(), (3, 7, 13), (40, 1000, 9000), (1, 10, 300)]
    for shape in shapes:
        for itemsizes in [(4, 4, 4), (2, 4, 2), (2,) * 8, (4,) * 8]:
            sizes = block_sizes.block_sizes(shape, itemsizes)
            batch, length, width = shape
            assert batch % sizes.rows == 0
            assert sizes.width == width or sizes.width % 128 == 0
            assert sizes.steps % sizes.group == 0
            assert sizes.group == length or sizes.group % (32 // min(itemsizes)) == 0
            block = sizes.rows * sizes.steps * sizes.width * sum(itemsizes)
            assert 2 * block <= block_sizes.VMEM_BUDGET_BYTES


def lowered(function, *arrays, platform="tpu"):
    traced = jax.jit(function).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def scan_loss(x, a):
    y, h_last = linear_scan(x, a)
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(h_last)


def rg_lru_loss(x, a):
    positions = jnp.ones(x.shape[:2], jnp.int32)
    y, h_last = rg_lru(x, a, x, jnp.ones(x.shape[2]), positions)
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(h_last)


@pytest.mark.parametrize("loss", [scan_loss, rg_lru_loss])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chosen_on_tpu_forward_and_backward(loss, dtype):
    array = jnp.ones((2, 20, 30), dtype)
    text = lowered(jax.grad(loss, (0, 1)), array, array)
    assert text.count("@tpu_custom_call") == 2
    assert "tpu_custom_call" not in lowered(loss, array, array, platform="cpu")


@pytest.mark.parametrize("loss", [scan_loss, rg_lru_loss])
def test_plain_code_stands_in(loss):
    """For dtypes that a kernel does not take, and for one step."""
    half = jnp.ones((2, 20, 30), jnp.float16)
    text = lowered(jax.grad(loss, (0, 1)), half, half)
    assert f'kernel_name = "{loss.__name__.removesuffix("_loss")}' not in text
    step = jnp.ones((2, 1, 30))
    assert "tpu_custom_call" not in lowered(loss, step, step)


def test_refused_by_name():
    half = jnp.ones((2, 20, 30), jnp.float16)
    with pytest.raises(NotImplementedError, match="pallas_tpu cannot run: it takes fl"):
        linear_scan(half, half, implementation="pallas_tpu")
