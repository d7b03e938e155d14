"""The contract of `linear_scan`, for every implementation."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.kernels import gpu, linear_scan
from recurrentgemma.kernels.linear_scan import IMPLEMENTATIONS, chunked
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS
from tests.kernels import definitions
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parents[1] / "golden" / "layers"
HERE = [
    name for name in IMPLEMENTATIONS if name != "mosaic_gpu" or not gpu.against_mosaic()
]
"""Implementations that the installed jax can run."""
ANY_LENGTH = [name for name in HERE if name != "one_step"]
B, D = 2, 13


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Several levels of groups in short scans, in code that compiles quickly."""
    monkeypatch.setattr(chunked, "GROUP", 8)
    monkeypatch.setattr(chunked, "SHORTEST", 8)


def random_inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    # Decays of both signs, some of them zero and some above one.
    a = rng.uniform(-0.6, 1.05, (B, length, D))
    a[rng.random(a.shape) < 0.1] = 0.0
    arrays = (
        rng.normal(size=(B, length, D)),
        a,
        rng.normal(size=(B, D)),
        rng.normal(size=(B, length, D)),
        rng.normal(size=(B, D)),
    )
    return [array.astype(np.float32) for array in arrays]


def evaluate(scan, x, a, h0, y_cotangent, last_cotangent):
    """Values and gradients by name."""

    def loss(x, a, h0):
        y, h_last = scan(x, a, h0)
        wide = y.astype(jnp.float32)
        total = jnp.sum(wide * y_cotangent) + jnp.sum(h_last * last_cotangent)
        return total, {"y": y, "h_last": h_last}

    differentiated = (0, 1) if h0 is None else (0, 1, 2)
    gradients, values = jax.grad(loss, differentiated, has_aux=True)(x, a, h0)
    names = ("grad_x", "grad_a", "grad_h0")
    return values | dict(zip(names, gradients, strict=False))


def run(implementation, inputs, reverse=False):
    def scan(x, a, h0):
        return linear_scan(x, a, h0, reverse=reverse, implementation=implementation)

    return jax.jit(lambda *arrays: evaluate(scan, *arrays))(*map(jnp.asarray, inputs))


def assert_all_close(actual, expected, quantity, dtype="float32"):
    for name, array in actual.items():
        kind = "gradient" if name.startswith("grad") else quantity
        assert_close(array, expected[name], kind, dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("implementation", "length"),
    [(name, length) for name in ANY_LENGTH for length in (1, 7, 128, 1000)]
    + [("one_step", 1)],
)
def test_values_and_gradients(implementation, length, reverse):
    inputs = random_inputs(length)
    actual = run(implementation, inputs, reverse)
    expected = definitions.linear_scan(*inputs, reverse=reverse)
    assert_all_close(actual, expected, "scan")


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        (case, name)
        for case in ("linear_scan_real", "linear_scan_real_long")
        for name in (None, *ANY_LENGTH)
    ]
    + [("linear_scan_one_step", name) for name in (None, *HERE)],
)
def test_golden(case, implementation):
    data = np.load(GOLDEN / case / "data.npz")
    # The rarer combinations of direction and h0 are for the default alone.
    for reverse, with_h0 in [(False, True), (True, False)]:
        prefix = ("reverse" if reverse else "forward") + (
            "_with_h0" if with_h0 else "_no_h0"
        )
        inputs = [data[name] for name in ("x", "a", "cotangent_y", "cotangent_last")]
        h0 = jnp.asarray(data["h0"]) if with_h0 else None

        def scan(x, a, h0, reverse=reverse):
            return linear_scan(x, a, h0, reverse=reverse, implementation=implementation)

        x, a, y_cotangent, last_cotangent = map(jnp.asarray, inputs)
        actual = jax.jit(lambda *arrays, scan=scan: evaluate(scan, *arrays))(
            x, a, h0, y_cotangent, last_cotangent
        )
        expected = {
            name: data[f"{prefix}/{name}"] for name in actual.keys() - {"h_last"}
        }
        expected["h_last"] = data[f"{prefix}/last"]
        assert_all_close(actual, expected, "scan")


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_dtypes(implementation):
    """bfloat16 inputs with float32 decays, and all bfloat16; the state is float32."""
    x, a, h0, y_cotangent, last_cotangent = random_inputs(128)
    x = jnp.asarray(x, jnp.bfloat16)
    for decay_dtype in (jnp.float32, jnp.bfloat16):
        decays = jnp.asarray(np.abs(a) * 0.9, decay_dtype)
        inputs = (x, decays, h0, y_cotangent, last_cotangent)
        actual = run(implementation, inputs)
        expected = definitions.linear_scan(*inputs)
        assert actual["y"].dtype == actual["grad_x"].dtype == jnp.bfloat16
        assert actual["h_last"].dtype == actual["grad_h0"].dtype == jnp.float32
        assert actual["grad_a"].dtype == decay_dtype
        # The carry is float32, so the last state does not see the rounding of y.
        assert_close(actual.pop("h_last"), expected["h_last"], "scan")
        assert_all_close(actual, expected, "scan", "bfloat16")


@pytest.fixture(scope="module")
def slow_decay():
    """Arguments of 100,000 steps, and their true states."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 100_000, 3)).astype(np.float32)
    a = np.full_like(x, 1 - 1e-6)
    h0 = np.full((1, 3), 100.0, np.float32)
    y = definitions.linear_states(x, a, h0)
    return tuple(map(jnp.asarray, (x, a, h0))), y


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_slow_decay_over_100000_steps(implementation, slow_decay):
    arguments, expected = slow_decay
    y, h_last = linear_scan(*arguments, implementation=implementation)
    assert_close(y, expected, "long_scan")
    assert_close(h_last, expected[:, -1], "long_scan")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_split_invariance(implementation, reverse):
    """Two chunks, the state carried between them, are one scan: gradients too."""
    inputs = random_inputs(128)
    split = 51

    def two_scans(x, a, h0):
        early, late = (x[:, :split], a[:, :split]), (x[:, split:], a[:, split:])
        options = {"reverse": reverse, "implementation": implementation}
        if reverse:
            y_late, h = linear_scan(*late, h0, **options)
            y_early, h = linear_scan(*early, h, **options)
        else:
            y_early, h = linear_scan(*early, h0, **options)
            y_late, h = linear_scan(*late, h, **options)
        return jnp.concatenate([y_early, y_late], axis=1), h

    actual = jax.jit(lambda *arrays: evaluate(two_scans, *arrays))(*inputs)
    assert_all_close(actual, definitions.linear_scan(*inputs, reverse=reverse), "scan")


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_transformations_and_determinism(implementation):
    """vmap of remat inside a lax.scan, differentiated: as the plain call, and twice."""
    inputs = random_inputs(7)

    def scan(x, a, h0):
        return linear_scan(x, a, h0, implementation=implementation)

    def transformed(x, a, h0):
        one_row = jax.checkpoint(lambda *row: scan(*(array[None] for array in row)))

        def layer(_, layer_inputs):
            return None, jax.vmap(one_row)(*layer_inputs)

        stacked = jax.tree.map(lambda array: array[None], (x, a, h0))
        y, h_last = jax.lax.scan(layer, None, stacked)[1]
        return y[0, :, 0], h_last[0, :, 0]

    compiled = jax.jit(lambda *arrays: evaluate(transformed, *arrays))
    first, second = compiled(*inputs), compiled(*inputs)
    for name, expected in run(implementation, inputs).items():
        assert_close(first[name], expected, "scan")
        np.testing.assert_array_equal(first[name], second[name])


def test_second_derivatives():
    x, a, h0, *_ = random_inputs(7)
    arrays = jnp.asarray(x), jnp.asarray(a), jnp.asarray(h0)

    def loss(scale):
        x, a, h0 = arrays
        y, h_last = linear_scan(x * scale, a * scale, h0)
        return jnp.sum(y) + jnp.sum(h_last)

    x, a, h0 = (np.float64(array) for array in (x, a, h0))

    def definition(scale):
        ones = np.ones_like(x), np.ones_like(h0)
        found = definitions.linear_scan(x * scale, a * scale, h0, *ones)
        return float(np.sum(found["grad_x"] * x) + np.sum(found["grad_a"] * a))

    expected = (definition(1 + 1e-5) - definition(1 - 1e-5)) / 2e-5
    assert_close(jax.jit(jax.grad(jax.grad(loss)))(1.0), expected, "gradient")


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_every_workload_lowers(implementation, name):
    """For the platform of a kernel, with the kernel inside; gradients too."""
    batch, length, width = WORKLOADS[name]
    array = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    entry = IMPLEMENTATIONS[implementation]

    def loss(x, a):
        y, h_last = linear_scan(x, a, implementation=implementation)
        assert (y.shape, h_last.shape) == (array.shape, (batch, width))
        return jnp.sum(y) + jnp.sum(h_last)

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(array, array)
    text = traced.lower(lowering_platforms=(entry.kernel_for or "cpu",)).as_text()
    kernels = len(re.findall("@tpu_custom_call|xla.gpu.triton|@mosaic_gpu", text))
    assert kernels >= 2 if entry.kernel_for else kernels == 0


def test_the_reference_differentiates_in_every_mode():
    """Forward mode, and forward over reverse, as the gradient of the gradient is."""
    x, a, h0, *_ = map(jnp.asarray, random_inputs(7))

    def loss(scale):
        y, h_last = linear_scan(x, a * scale, h0 * scale, implementation="reference")
        return jnp.sum(y**2) + jnp.sum(h_last)

    @jax.jit
    def derivatives(scale):
        forward_over_reverse = jax.jvp(jax.grad(loss), (scale,), (scale,))[1]
        first = jax.grad(loss)(scale), jax.jacfwd(loss)(scale)
        return *first, jax.grad(jax.grad(loss))(scale), forward_over_reverse

    first, forward_first, second, forward_second = derivatives(1.0)
    assert_close(forward_first, first, "gradient")
    assert_close(forward_second, second, "gradient")


def test_errors():
    x, a, h0, *_ = map(jnp.asarray, random_inputs(7))
    for arguments, message in [
        ((x[0], a), r"x: expected shape \[B, T, D\]"),
        ((x[:, :0], a), "T >= 1"),
        ((x, a[:, 1:]), r"a: expected floating \(2, 7, 13\), got float32 \(2, 6, 13"),
        ((x, a.astype(jnp.int32)), "a: expected floating .* got int32"),
        ((x, a, h0[:1]), r"h0: expected float32 \(2, 13\)"),
        ((x, a, h0.astype(jnp.bfloat16)), "got bfloat16"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_scan(*arguments)
    with pytest.raises(NotImplementedError, match="expected one of associative, chun"):
        linear_scan(x, a, implementation="fastest")
    with pytest.raises(NotImplementedError, match="takes one step, not 7"):
        linear_scan(x, a, implementation="one_step")
