"""The scans for GPU beyond the contract tests: older cards, and the real compilers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.kernels import linear_scan, rg_lru
from recurrentgemma.kernels.linear_scan.pallas_gpu import UNROLL
from recurrentgemma.kernels.linear_scan.triton_programs import (
    CHANNELS,
    PROGRAMS,
    ROW_BYTES,
    choose_schedule,
)
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS
from tests.kernels import definitions
from tests.tolerances import assert_close


@pytest.mark.parametrize("decay_dtype", ["float16", "float32"])
def test_float16_on_cards_without_a_kernel(decay_dtype):
    """float16 has three bits more than bfloat16, and so it may miss by an eighth."""
    rng = np.random.default_rng(0)
    x, y_cotangent = rng.normal(size=(2, 2, 200, 13)).astype(np.float16)
    a = rng.uniform(-0.6, 0.99, x.shape).astype(decay_dtype)
    h0, last_cotangent = rng.normal(size=(2, 2, 13)).astype(np.float32)

    @jax.jit
    def run(x, a, h0):
        results, pull_back = jax.vjp(
            lambda *arrays: linear_scan(*arrays, implementation="chunked"), x, a, h0
        )
        return results, pull_back((y_cotangent, last_cotangent))

    (y, h_last), gradients = run(x, a, h0)
    expected = definitions.linear_scan(x, a, h0, y_cotangent, last_cotangent)
    assert (y.dtype, h_last.dtype) == ("float16", "float32")
    assert_close(h_last, expected["h_last"], "scan")
    assert_close(y, expected["y"], "scan", "float16")
    for name, gradient in zip(("x", "a", "h0"), gradients, strict=True):
        assert_close(gradient, expected[f"grad_{name}"], "gradient", "float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_chunks_fill_the_chip_and_cover_time(name, dtype):
    batch, length, width = WORKLOADS[name]
    array = jax.ShapeDtypeStruct(WORKLOADS[name], dtype)
    schedule = choose_schedule([array], UNROLL, False, False)
    chunk, chunks = schedule.chunk, schedule.chunks
    assert 0 <= chunk * chunks - length < chunk
    assert chunks == 1 or chunk % UNROLL == 0
    programs = batch * width // schedule.channels * chunks
    assert programs >= 0.75 * PROGRAMS or chunk <= 4 * UNROLL
    # One pass over the inputs where rows and channels are enough.
    enough = batch * width // min(CHANNELS) >= PROGRAMS
    assert (chunks == 1) == (enough or length == 1)
    # A thread loads 4 bytes, or spares the second pass.
    assert schedule.channels * array.dtype.itemsize == ROW_BYTES or enough


def test_rg_lru_with_mixed_dtypes_and_several_blocks_of_channels():
    rng = np.random.default_rng(0)
    shape = batch, length, width = 2, 300, 70
    x, recurrence, input_, y_gradient = rng.normal(size=(4, *shape)).astype(np.float16)
    recurrence, input_ = recurrence.astype(np.float32), input_.astype(jnp.bfloat16)
    h0, last_gradient = rng.normal(size=(2, batch, width)).astype(np.float32)
    a_param = np.linspace(-9, 1, width, dtype=np.float32)
    positions = rng.integers(-1, 20, (batch, length), np.int32)

    @jax.jit
    def run(*arrays):
        def op(x, recurrence, input_, a_param, h0):
            arguments = (x, recurrence, input_, a_param, positions, h0)
            return rg_lru(*arguments, implementation="pallas_gpu")

        results, pull_back = jax.vjp(op, *arrays)
        return results, pull_back((y_gradient, last_gradient))

    arrays = (x, recurrence, input_, a_param, h0)
    (y, h_last), gradients = run(*arrays)
    expected = definitions.rg_lru(*arrays[:4], positions, h0, y_gradient, last_gradient)
    assert_close(h_last, expected["h_last"], "scan")
    assert_close(y, expected["y"], "scan", "float16")
    names = ("x", "recurrence_logits", "input_logits", "a_param", "h0")
    for name, array, gradient in zip(names, arrays, gradients, strict=True):
        assert gradient.dtype == array.dtype, name
        precision = "bfloat16" if name == "input_logits" else "float16"
        assert_close(gradient, expected[f"grad_{name}"], "gradient", precision)


def test_rg_lru_remembers_for_100000_steps():
    """Decays of 1 - 1e-6 across chunks; the same input for ever has a closed form."""
    shape = (1, 100_000, 2)
    zeros, positions = np.zeros(shape, np.float32), np.ones(shape[:2], np.int32)
    a_param = np.array([-15.0, -14.0], np.float32)
    y, _ = rg_lru(
        *map(jnp.asarray, (zeros + 1, zeros, zeros, a_param, positions)),
        implementation="pallas_gpu",
    )
    log_a = -8 * np.log1p(np.exp(a_param.astype(np.float64))) / 2
    steps = np.arange(1, shape[1] + 1)[:, None]
    # A decay is rounded once, as the reference's: 1 - a by a hundredth.
    a = np.exp(log_a).astype(np.float32).astype(np.float64)
    gained = (1 - a**steps) / (1 - a)
    expected = np.sqrt(-np.expm1(2 * log_a)) / 2 * gained
    assert_close(y, expected[None], "long_scan")


def scan_loss(x, a):
    y, h_last = linear_scan(x, a, implementation="pallas_gpu")
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(h_last)


def rg_lru_loss(x, logits):
    positions = jnp.ones(x.shape[:2], jnp.int32)
    a_param = jnp.ones(x.shape[2])
    y, h_last = rg_lru(
        x, logits, logits, a_param, positions, implementation="pallas_gpu"
    )
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(h_last)


@pytest.mark.parametrize("loss", [scan_loss, rg_lru_loss])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_lowers_for_a_gpu(dtype, loss):
    """One kernel a pass, and two passes where time is cut into chunks."""
    for shape, passes in (((8, 256, 2560), 1), ((1, 256, 2560), 2)):
        x = jax.ShapeDtypeStruct(shape, dtype)
        a = jax.ShapeDtypeStruct(shape, jnp.float32)
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, a)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("xla.gpu.triton") == 2 * passes


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None
    or importlib.util.find_spec("nvidia.cuda_nvcc") is None,
    reason="needs jax-cuda12-plugin and nvidia-cuda-nvcc-cu12 (no GPU)",
)
def test_machine_code_has_no_spills(tmp_path):
    probe = Path(__file__).with_name("ptx_probe.py")
    result = subprocess.run(
        [sys.executable, probe, tmp_path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = json.loads(result.stdout.splitlines()[-1])
    passes = ("", "_summary", "_gradient", "_adjoint")
    ops = ("linear_scan", "rg_lru")
    assert set(kernels) == {name + end for name in ops for end in passes}
    for name, report in kernels.items():
        assert report["spill_bytes"] == 0, (name, report)
        assert report["registers"] <= 168, (name, report)
