"""The scans for GPU beyond the contract tests: older cards, and the real compilers."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.kernels import gpu, linear_scan, rg_lru
from recurrentgemma.kernels.linear_scan import gpu_blocks, gpu_programs, triton_programs
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
    blocks = gpu_blocks.find("linear_scan", [array], False)
    schedule = gpu_programs.choose_schedule([array], blocks, False, False)
    chunk, chunks = schedule.chunk, schedule.chunks
    assert 0 <= chunk * chunks - length < chunk
    assert chunks == 1 or chunk % blocks.unroll == 0
    programs = batch * width // schedule.channels * chunks
    assert programs >= 0.75 * blocks.programs or chunk < 2 * blocks.shortest_chunk
    # One pass over the inputs where rows and channels are enough.
    enough = batch * width // min(blocks.channels) >= blocks.programs
    assert (chunks == 1) == (enough or length == 1)
    # A thread loads 4 bytes, or spares the second pass.
    assert schedule.channels * array.dtype.itemsize == 128 or enough


NAMES = ("x", "recurrence_logits", "input_logits", "a_param", "h0")


def rg_lru_and_gradients(arrays, positions, upstream):
    """Results, and gradients of the arrays that are called `NAMES`, by the kernel."""

    @jax.jit
    def run(*arrays):
        def op(*arrays):
            *others, h0 = arrays
            return rg_lru(*others, positions, h0, implementation="pallas_gpu")

        results, pull_back = jax.vjp(op, *arrays)
        return results, pull_back(upstream)

    return run(*arrays)


def test_rg_lru_with_mixed_dtypes_and_several_blocks_of_channels():
    rng = np.random.default_rng(0)
    shape = batch, length, width = 2, 300, 70
    x, recurrence, input_, y_gradient = rng.normal(size=(4, *shape)).astype(np.float16)
    recurrence, input_ = recurrence.astype(np.float32), input_.astype(jnp.bfloat16)
    h0, last_gradient = rng.normal(size=(2, batch, width)).astype(np.float32)
    a_param = np.linspace(-9, 1, width, dtype=np.float32)
    positions = rng.integers(-1, 20, (batch, length), np.int32)

    arrays = (x, recurrence, input_, a_param, h0)
    upstream = y_gradient, last_gradient
    (y, h_last), gradients = rg_lru_and_gradients(arrays, positions, upstream)
    expected = definitions.rg_lru(*arrays[:4], positions, h0, *upstream)
    assert_close(h_last, expected["h_last"], "scan")
    assert_close(y, expected["y"], "scan", "float16")
    for name, array, gradient in zip(NAMES, arrays, gradients, strict=True):
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


APPROXIMATE = 2.0**-22
"""Relative error of the instructions that approximate, by the PTX ISA: two units in the
last place at most."""
TINY = np.finfo(np.float32).tiny


def flush(x):
    return jnp.where(jnp.abs(x) < TINY, jnp.copysign(0.0, x), x)


def approximate(function):
    """An instruction `.approx.ftz.f32`, off by as much as it may be, now up, now down."""

    def run(x):
        up = jnp.floor(1000 * x) % 2 == 0
        return flush(
            function(flush(x)) * jnp.where(up, 1 + APPROXIMATE, 1 - APPROXIMATE)
        )

    return run


def fused(a, b, c):
    """a b + c with one rounding, of pairs whose products are exact (Dekker)."""

    def halves(x):
        big = x * 4097.0
        high = big - (big - x)
        return high, x - high

    (a1, a0), (b1, b0), product = halves(a), halves(b), a * b
    left = a0 * b0 - (((product - a1 * b1) - a0 * b1) - a1 * b0)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    exact = jnp.isfinite(left) & (jnp.abs(product) < 1e30)
    return jnp.where(exact, total + (lost + left), a * b + c)


def power_of_two(x):
    """With the whole part exact, which XLA for CPU is not far from 0."""
    x = jnp.clip(x, -200, 200)
    whole = jnp.floor(x)
    return jnp.ldexp(jnp.exp2(x - whole), whole.astype(jnp.int32))


INSTRUCTIONS = {
    "fma.rn.f32": fused,
    "ex2.approx.ftz.f32": approximate(power_of_two),
    "rcp.approx.ftz.f32": approximate(lambda x: 1 / x),
    "rsqrt.approx.ftz.f32": approximate(jax.lax.rsqrt),
}
"""By the PTX ISA, section 9.7.3."""


def execute(assembly, *, args, constraints, pack, result_shape_dtypes):
    """What a thread does with one instruction, as Triton's inline assembly gives it."""
    name, operands = assembly.removesuffix(";").split(" ", 1)
    registers = [f"${i}" for i in range(len(args) + 1)]
    assert operands.split(", ") == registers
    assert constraints == ",".join(["=f", *["f"] * len(args)])
    assert pack == 1
    (result,) = result_shape_dtypes
    assert all(a.shape == result.shape and a.dtype == result.dtype for a in args)
    return [INSTRUCTIONS[name](*args)]


@pytest.fixture
def with_instructions(monkeypatch):
    """Interpreted kernels compute with the instructions that a GPU runs."""
    monkeypatch.setattr(triton_programs.triton, "elementwise_inline_asm", execute)
    monkeypatch.setattr(gpu_programs, "PLAIN", triton_programs.ARITHMETIC)
    jax.clear_caches()
    yield triton_programs.ARITHMETIC
    jax.clear_caches()


def test_each_instruction_is_what_it_stands_for(with_instructions):
    """Within its error, where results are normal numbers; and at the edges."""
    x = np.concatenate([np.linspace(-125, 125, 999), [0.0]]).astype(np.float32)
    positive = np.exp2(x)
    a, b, c = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    c[:500] = -a[:500] * b[:500]  # what is left are the digits that a product drops
    far = np.array([-np.inf, -200.0, 200.0, np.inf], np.float32)
    edges = np.array([np.inf, 0.0, 1e-40], np.float32)

    @jax.jit
    def run():
        ops = with_instructions
        approximate = ops.exp2(x), ops.reciprocal(positive), ops.rsqrt(positive)
        at_edges = ops.exp2(far), ops.reciprocal(edges), ops.rsqrt(edges)
        return approximate, ops.multiply_add(a, b, c), at_edges

    found, sums, at_edges = run()
    wide = positive.astype(np.float64)
    for result, expected in zip(found, (wide, 1 / wide, wide**-0.5), strict=True):
        np.testing.assert_allclose(result, expected, rtol=3 * APPROXIMATE)
    products = a.astype(np.float64) * b.astype(np.float64)
    np.testing.assert_array_equal(sums, (products + c).astype(np.float32))
    infinite = [0.0, np.inf, np.inf]
    for result, expected in zip(
        at_edges, ([0.0, 0.0, np.inf, np.inf], infinite, infinite), strict=True
    ):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.slow
def test_rg_lru_by_the_instructions_of_a_gpu(with_instructions):
    """Values and gradients, with logits so large that the gates are 0 and 1."""
    rng = np.random.default_rng(0)
    shape = batch, length, width = 1, 150, 9
    x, recurrence, input_, y_gradient = rng.normal(size=(4, *shape)).astype(np.float32)
    recurrence[0, ::7, ::2], input_[0, ::5, ::3] = -200, 200
    recurrence[0, 3::7, ::2], input_[0, 3::5, ::3] = 200, -200
    h0, last_gradient = rng.normal(size=(2, batch, width)).astype(np.float32)
    a_param = np.linspace(-9, 1, width, dtype=np.float32)
    positions = rng.integers(-1, 20, (batch, length), np.int32)

    arrays = (x, recurrence, input_, a_param, h0)
    upstream = y_gradient, last_gradient
    (y, h_last), gradients = rg_lru_and_gradients(arrays, positions, upstream)
    expected = definitions.rg_lru(*arrays[:4], positions, h0, *upstream)
    assert_close(y, expected["y"], "scan")
    assert_close(h_last, expected["h_last"], "scan")
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert_close(gradient, expected[f"grad_{name}"], "gradient")


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs jax 0.10")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scan_lowers_by_mosaic(dtype):
    """The same kernels, in two passes: the warps of a chip are four to a program."""
    x = jax.ShapeDtypeStruct((1, 1000, 256), dtype)

    def loss(x, a):
        y, _ = linear_scan(x, a, implementation="mosaic_gpu")
        return jnp.sum(y.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 4, text.count("@mosaic_gpu")


def test_where_mosaic_cannot_run(monkeypatch):
    x = jnp.ones((1, 8, 4))
    run = partial(linear_scan, x, x, implementation="mosaic_gpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    with pytest.raises(NotImplementedError, match=r"wants jax 0\.10, not"):
        run()
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(gpu, "capability", lambda: (8, 9))
    with pytest.raises(NotImplementedError, match=r"capability 9\.0, not 8\.9"):
        run()


needs_the_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None
    or importlib.util.find_spec("nvidia.cuda_nvcc") is None,
    reason="needs jax-cuda12-plugin and nvidia-cuda-nvcc-cu12 (no GPU)",
)


def probe(card, folder):
    program = Path(__file__).with_name("ptx_probe.py")
    return subprocess.run(
        [sys.executable, program, card, folder],
        capture_output=True,
        text=True,
        check=False,
    )


@needs_the_compiler
@pytest.mark.parametrize("card", ["A100", "H100"])
def test_machine_code(card, tmp_path):
    """No register is spilled, and no group of steps waits for its own loads."""
    result = probe(card, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = json.loads(result.stdout.splitlines()[-1])
    passes = ("", "_summary", "_gradient", "_adjoint")
    ops = ("linear_scan", "rg_lru")
    expected = {name + end for name in ops for end in passes}
    by_mosaic = {f"linear_scan{end}_mosaic_gpu_kernel" for end in passes}
    assert set(kernels) == expected | (by_mosaic if card == "H100" else set())
    # Mosaic's compiler moves loads down to their use where nothing is stored between.
    waiting = {name for name in by_mosaic if "summary" in name or "adjoint" in name}
    for name, report in kernels.items():
        assert report["spill_bytes"] == 0, (name, report)
        assert report["registers"] <= 168, (name, report)
        assert name in waiting or report["waits"] == 0, (name, report)


@needs_the_compiler
def test_machine_code_of_older_cards_is_refused(tmp_path):
    """Which is why `gpu.LEAST_CAPABILITY` is what it is."""
    result = probe("T4", tmp_path)
    assert result.returncode != 0
    least = ".".join(map(str, gpu.LEAST_CAPABILITY))
    assert f"(compute capability {least}) and up" in result.stderr
