"""The complex scan against golden numbers and a complex NumPy loop."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.kernels.complex_rg_lru import complex_linear_scan, complex_rg_lru
from tests.kernels import definitions
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parents[1] / "golden" / "layers"
B, E = 2, 6
HALF = E // 2


def merged(data, name):
    """Real parts, then imaginary ones."""
    return np.concatenate([data[f"{name}_real"], data[f"{name}_imag"]], axis=-1)


def evaluate(scan, x, a, h0, y_cotangent, last_cotangent):
    """Values and gradients by name."""

    def loss(x, a, h0):
        y, last = scan(x, a, h0)
        total = jnp.sum(y * y_cotangent) + jnp.sum(last * last_cotangent)
        return total, {"y": y, "last": last}

    gradients, values = jax.grad(loss, (0, 1, 2), has_aux=True)(x, a, h0)
    names = ("grad_x", "grad_a", "grad_h0")
    return values | dict(zip(names, gradients, strict=True))


def assert_all_close(actual, expected):
    for name, array in actual.items():
        quantity = "gradient" if name.startswith("grad") else "scan"
        assert_close(array, expected[name], quantity)


@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_golden(reverse, with_h0):
    data = np.load(GOLDEN / "linear_scan_complex" / "data.npz")
    arrays = [
        merged(data, name) for name in ("x", "a", "h0", "cotangent_y", "cotangent_last")
    ]
    arrays[2] = arrays[2] if with_h0 else np.zeros_like(arrays[2])

    def scan(x, a, h0):
        return complex_linear_scan(x, a, h0, reverse=reverse)

    actual = jax.jit(lambda *arrays: evaluate(scan, *arrays))(*arrays)
    if not with_h0:
        del actual["grad_h0"]
    prefix = f"{'reverse' if reverse else 'forward'}_{'with' if with_h0 else 'no'}_h0"
    expected = {name: merged(data, f"{prefix}/{name}") for name in actual}
    assert_all_close(actual, expected)


def random_inputs(length, seed=0):
    """x, gates, decay parameters, positions, h0 and the cotangents of both results."""
    rng = np.random.default_rng(seed)
    kind = rng.random((B, length))
    positions = np.where(kind < 0.1, 0, np.where(kind < 0.2, -1, 5)).astype(np.int32)
    shapes = [(B, length, E), (B, length, HALF), (B, length, HALF)]
    x, r, i = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    a_param = rng.uniform(-9, 1, HALF).astype(np.float32)
    # Phases of several turns too.
    a_imag_param = rng.uniform(-20, 20, HALF).astype(np.float32)
    h0 = rng.normal(size=(B, E)).astype(np.float32)
    return x, r, i, a_param, a_imag_param, positions, h0


def definition(x, r, i, a_param, a_imag_param, positions, h0):
    """The CG-LRU as a complex128 loop."""
    r, i = (1 / (1 + np.exp(-np.float64(gate))) for gate in (r, i))
    log_decay = -8 * np.log1p(np.exp(np.float64(a_param)))
    a = np.exp((log_decay + 1j * np.float64(a_imag_param)) * r)
    multiplier = np.sqrt(-np.expm1(2 * log_decay * r))
    start, hold = (positions == 0)[..., None], (positions < 0)[..., None]
    a = np.where(start, 0, np.where(hold, 1, a))
    multiplier = np.where(start, 1, np.where(hold, 0, multiplier))
    x, h = (np.float64(z[..., :HALF]) + 1j * z[..., HALF:] for z in (x, h0))
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        h = a[:, t] * h + multiplier[:, t] * i[:, t] * x[:, t]
        y[:, t] = h
    return (np.concatenate([z.real, z.imag], axis=-1) for z in (y, h))


@pytest.mark.parametrize("length", [1, 7, 128])
def test_values(length):
    inputs = random_inputs(length)
    for actual, expected in zip(
        jax.jit(complex_rg_lru)(*inputs), definition(*inputs), strict=True
    ):
        assert_close(actual, expected, "scan")


def test_split_invariance():
    """The state carried between two chunks is the whole of it."""
    *inputs, h = random_inputs(60)
    op = jax.jit(complex_rg_lru)
    parts = []
    for chunk in (slice(0, 23), slice(23, 24), slice(24, 60)):
        x, r, i, a_param, a_imag_param, positions = inputs
        y, h = op(
            *(array[:, chunk] for array in (x, r, i)),
            a_param,
            a_imag_param,
            positions[:, chunk],
            h,
        )
        parts.append(y)
    y_true, last_true = definition(*random_inputs(60))
    assert_close(np.concatenate(parts, axis=1), y_true, "scan")
    assert_close(h, last_true, "scan")


def test_starts_and_holds():
    x, r, i, a_param, a_imag_param, _, h0 = random_inputs(7)
    positions = np.array([[8, 9, -1, -1, 0, 1, 2]] * B, np.int32)
    op = jax.jit(complex_rg_lru)
    y, _ = op(x, r, i, a_param, a_imag_param, positions, h0)
    np.testing.assert_array_equal(y[:, 3], y[:, 1])
    x[:, :4] += 1
    changed, _ = op(x, r, i, a_param, a_imag_param, positions, h0 + 1)
    assert_close(changed[:, 4:], y[:, 4:], "scan")
    _, held = op(x, r, i, a_param, a_imag_param, np.full_like(positions, -1), h0)
    np.testing.assert_array_equal(held, h0)


def test_phase_keeps_its_digits_over_many_steps():
    """A decay of one that turns by 1 radian a step, 20000 times."""
    length = 20_000
    angle = np.arange(1, length + 1, dtype=np.float64) * np.float32(1.0)
    a = np.tile(np.float32([[[np.cos(1.0), np.sin(1.0)]]]), (1, length, 1))
    h0 = np.float32([[1.0, 0.0]])
    y, _ = jax.jit(complex_linear_scan)(np.zeros_like(a), a, h0)
    # The two numbers of the decay are rounded to float32: 4e-8 radians a step.
    expected = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None]
    np.testing.assert_allclose(y, expected, atol=2e-3)


def test_real_numbers_give_the_real_scan():
    rng = np.random.default_rng(0)
    x, a, dy = rng.normal(size=(3, B, 40, HALF)).astype(np.float32)
    h0, dlast = rng.normal(size=(2, B, HALF)).astype(np.float32)
    arrays = [
        np.concatenate([z, np.zeros_like(z)], axis=-1) for z in (x, a, h0, dy, dlast)
    ]
    actual = jax.jit(lambda *arrays: evaluate(complex_linear_scan, *arrays))(*arrays)
    expected = definitions.linear_scan(x, a, h0, dy, dlast)
    expected["last"] = expected.pop("h_last")
    assert_all_close({n: z[..., :HALF] for n, z in actual.items()}, expected)


def test_errors():
    x, r, i, a_param, a_imag_param, positions, h0 = random_inputs(7)
    for arguments, message in [
        ((x[..., 1:], r, i, a_param, a_imag_param, positions), "an even E"),
        ((x, x, i, a_param, a_imag_param, positions), r"recurrence_logits: expected"),
        ((x, r, i, a_param, a_imag_param[1:], positions), r"a_imag_param: .* \(3,\)"),
        (
            (x, r, i, a_param, a_imag_param, positions, h0[:1]),
            r"h0: expected float32 \(2, 6\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            complex_rg_lru(*map(jnp.asarray, arguments))
    with pytest.raises(ValueError, match=r"a: expected floating \(2, 7, 6"):
        complex_linear_scan(jnp.asarray(x), jnp.asarray(r))
