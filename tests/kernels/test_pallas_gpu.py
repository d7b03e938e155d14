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
from recurrentgemma.kernels.linear_scan.pallas_gpu import (
    CHANNELS,
    PROGRAMS,
    UNROLL,
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


@pytest.mark.parametrize("name", WORKLOADS)
def test_chunks_fill_the_chip_and_cover_time(name):
    batch, length, width = WORKLOADS[name]
    sizes = choose_schedule((batch, length, width), UNROLL, False, False)
    assert 0 <= sizes.chunk * sizes.chunks - length < sizes.chunk
    assert sizes.chunks == 1 or sizes.chunk % UNROLL == 0
    programs = batch * width // CHANNELS * sizes.chunks
    assert programs >= 0.75 * PROGRAMS or sizes.chunk <= 4 * UNROLL
    # One pass over the inputs where rows and channels are enough.
    assert (sizes.chunks == 1) == (batch * width // CHANNELS >= PROGRAMS or length == 1)


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
