"""The TPU kernels of the recurrence beyond the contract: blocks, races, choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.kernels import (
    Gate,
    StepParameters,
    linear_scan,
    recurrent_step,
    rg_lru,
)
from recurrentgemma.kernels.linear_scan import block_sizes, workloads
from recurrentgemma.kernels.linear_scan import pallas_tpu as scan_kernels
from recurrentgemma.kernels.rg_lru import pallas_tpu as rg_lru_kernels
from recurrentgemma.kernels.rg_lru.gates import Inputs
from recurrentgemma.kernels.tpu_chips import Chip
from tests.kernels import definitions
from tests.kernels.watched import watched
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


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_all_close(actual, expected, dtype="float32"):
    for name, array in actual.items():
        kind = "gradient" if name.startswith("grad") else "scan"
        narrow = kind == "gradient" or array.dtype != jnp.float32
        assert_close(array, expected[name], kind, dtype if narrow else "float32")


@pytest.mark.parametrize(("dtype", "group"), [("float32", 8), ("bfloat16", 16)])
def test_scan_over_many_blocks(small_blocks, dtype, group, capfd):
    x, y_gradient = jnp.asarray(random(2, B, T, D), dtype)
    h0, last_gradient = random(2, B, D)
    a = np.random.default_rng(1).uniform(-0.6, 1.05, x.shape).astype(np.float32)
    sizes = block_sizes.block_sizes(x.shape, (x.dtype.itemsize, 4, x.dtype.itemsize))
    assert sizes[:4] == (2, 16, 128, group)

    expected = definitions.linear_scan(x, a, h0, y_gradient, last_gradient)
    with watched(capfd, dtype == "float32") as interpret:
        y, h_last = scan_kernels.scan(x, a, h0, reverse=False, interpret=interpret)
        gradients = scan_kernels.gradients(
            a, h0, y, y_gradient, last_gradient, interpret=interpret
        )
    names = ("grad_x", "grad_a", "grad_h0")
    actual = dict(zip(names, gradients, strict=True)) | {"y": y, "h_last": h_last}
    assert_all_close(actual, expected, dtype)

    y, h_last = scan_kernels.scan(x, a, h0, reverse=True, interpret=True)
    expected = definitions.linear_scan(x, a, h0, x, h0, reverse=True)
    assert_all_close({"y": y, "h_last": h_last}, expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rg_lru_over_many_blocks(small_blocks, dtype, capfd):
    """Slow channels too: a gradient is compared with the largest of its channel."""
    x, recurrence, input_, y_gradient = jnp.asarray(random(4, B, T, D), dtype)
    h0, last_gradient = random(2, B, D)
    a_param = np.linspace(-9, 1, D, dtype=np.float32)
    positions = np.arange(T, dtype=np.int32)[None] + np.array([[0], [1], [5], [9]])
    positions = positions.astype(np.int32)
    positions[1, 7], positions[2, 9:], positions[3, 16:19] = 0, -1, [-1, -1, 0]
    inputs = Inputs(x, recurrence, input_, a_param, positions, h0)

    expected = definitions.rg_lru(*inputs, y_gradient, last_gradient)
    with watched(capfd, dtype == "float32") as interpret:
        y, h_last = rg_lru_kernels.recurrence(inputs, interpret=interpret)
        (gradients,) = rg_lru_kernels.gradients(
            (inputs,), (y, None), (y_gradient, last_gradient), interpret=interpret
        )
    assert_all_close({"y": y, "h_last": h_last}, expected, dtype)
    names = ("x", "recurrence_logits", "input_logits", "a_param", "positions", "h0")
    actual = dict(zip(names, gradients, strict=True))
    assert actual.pop("positions") is None
    for name, gradient in actual.items():
        # A sum of terms of both signs leaves few of bfloat16's 8 bits.
        few = name == "a_param" and dtype == "bfloat16"
        quantity = "gradient" if few else "channel_gradient"
        assert_close(gradient, expected[f"grad_{name}"], quantity, dtype)


def test_decays_near_one_keep_their_digits(monkeypatch):
    """With an exponential that is off by 4 units in the last place, as on TPU."""
    exp = jnp.exp
    monkeypatch.setattr(jnp, "exp", lambda x: exp(x) * (1 + 4 * 2.0**-23))
    logits = np.linspace(-6, 6, 97, dtype=np.float32)[:, None]
    a_param = np.linspace(-14, 1, 64)
    log_decay = (-8 * np.log1p(np.exp(a_param))).astype(np.float32)[None]
    *_, a, u = jax.jit(rg_lru_kernels.gates)(logits, logits, log_decay)

    log_a = log_decay.astype(np.float64) / (1 + np.exp(-logits.astype(np.float64)))
    assert_close(u, -np.expm1(2 * log_a), "decay")
    near = log_a > -0.01
    assert near.sum() > 1000
    assert_close(a[near], np.exp(log_a[near]), "decay_near_one")


def test_prefill_and_decode_round_alike(monkeypatch):
    """In bfloat16: the step's kernel, that with products inside, and the plain form.

    Factors are small multiples of powers of two, so that products have no rounding; a
    convolution of one tap changes nothing.
    """
    rng = np.random.default_rng(2)
    width, length = 128, 6

    def eighths(*shape):
        return jnp.asarray(rng.integers(-8, 9, shape) / 8, jnp.bfloat16)

    x, h = eighths(2, length, width), random(2, width)
    gates = [
        Gate(eighths(1, width, width) / 8, random(1, width, seed=seed))
        for seed in (3, 4)
    ]
    a_param = jnp.linspace(-9, 1, width)
    positions = jnp.asarray([np.arange(length), np.arange(5, 5 + length)], jnp.int32)

    def sequence(implementation):
        return rg_lru(
            *(x, *gates, a_param, positions, h), implementation=implementation
        )

    taps = jnp.zeros((2, width)).at[1].set(1.0)
    parameters = StepParameters(taps, jnp.zeros(width), *gates, a_param)
    state = jnp.zeros((2, 1, width), jnp.bfloat16)
    steps = {}
    for name in ("reference", "pallas_tpu"):
        steps[name] = h
        for t in range(length):
            _, steps[name], state = recurrent_step(
                *(x[:, t], parameters, positions[:, t], steps[name], state),
                implementation=name,
            )
    expected = sequence("composed")[1]
    for actual in (sequence("pallas_tpu")[1], *steps.values()):
        assert_close(actual, expected, "scan")


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


def test_two_cores_get_equal_shares():
    """Where channels can be cut into as many tiles; one core keeps the larger blocks."""
    two = Chip(cores=2)
    shapes = [*workloads.WORKLOADS.values(), (3, 40, 512), (2, 9, 256), (1, 9, 9000)]
    for batch, length, width in shapes:
        shape = batch, length, width
        found = [block_sizes.block_sizes(shape, (2, 4, 2), chip=two)]
        if width % 256 == 0:
            for gradient in (False, True):
                found.append(
                    block_sizes.gate_block_sizes(
                        shape, 128, 2, gradient=gradient, chip=two
                    )
                )
        for blocks in found:
            programs = batch // blocks.rows * -(-width // blocks.width)
            assert programs % 2 == 0 or programs > block_sizes.FEW_PROGRAMS
    document = workloads.WORKLOADS["document_2b"]
    assert block_sizes.block_sizes(document, (2, 2, 2)).width == document.width
    # No tile to spare.
    assert block_sizes.block_sizes((1, 9, 128), (2, 2, 2), chip=two).width == 128


def test_gate_block_sizes_fit():
    """Whole gate blocks, whole products of 128 steps for the models that there are."""
    for batch, length, width in [*workloads.WORKLOADS.values(), (6, 40, 8192)]:
        for itemsize in (2, 4):
            for gradient in (False, True):
                sizes = block_sizes.gate_block_sizes(
                    (batch, length, width), 256, itemsize, gradient=gradient
                )
                assert batch % sizes.rows == width % sizes.width == 0
                assert sizes.width % 256 == sizes.steps % sizes.group == 0
                assert sizes.steps >= min(length, 128)
    huge = block_sizes.gate_block_sizes((1, 8, 2048), 2048, 4, gradient=True)
    assert huge is None


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
