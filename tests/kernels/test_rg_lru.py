"""The contract of `rg_lru`, for every implementation."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from recurrentgemma.kernels import rg_lru
from recurrentgemma.kernels.rg_lru import IMPLEMENTATIONS
from tests.kernels import definitions
from tests.tolerances import assert_close

GOLDEN = Path(__file__).parents[1] / "golden" / "layers"
ANY_LENGTH = [name for name in IMPLEMENTATIONS if name != "one_step"]
NAMES = ("x", "recurrence_logits", "input_logits", "a_param", "h0")
B, E = 3, 13


def random_inputs(length, seed=0):
    """Arguments and two cotangents; documents start and rows are held anywhere."""
    rng = np.random.default_rng(seed)
    kind = rng.random((B, length))
    positions = np.where(kind < 0.1, 0, np.where(kind < 0.2, -1, 5)).astype(np.int32)
    x, recurrence_logits, input_logits, y_cotangent = rng.normal(
        size=(4, B, length, E)
    ).astype(np.float32)
    h0, last_cotangent = rng.normal(size=(2, B, E)).astype(np.float32)
    a_param = rng.uniform(-9, 1, E).astype(np.float32)
    arguments = (x, recurrence_logits, input_logits, a_param, positions, h0)
    return (*arguments, y_cotangent, last_cotangent)


def evaluate(op, *inputs):
    """Values and gradients by name."""
    *arguments, y_cotangent, last_cotangent = inputs

    def loss(*arguments):
        y, h_last = op(*arguments)
        wide = y.astype(jnp.float32)
        total = jnp.sum(wide * y_cotangent) + jnp.sum(h_last * last_cotangent)
        return total, {"y": y, "h_last": h_last}

    differentiated = (0, 1, 2, 3, 5)
    gradients, values = jax.grad(loss, differentiated, has_aux=True)(*arguments)
    names = (f"grad_{name}" for name in NAMES)
    return values | dict(zip(names, gradients, strict=True))


def run(implementation, inputs):
    def op(*arguments):
        return rg_lru(*arguments, implementation=implementation)

    return jax.jit(lambda *arrays: evaluate(op, *arrays))(*map(jnp.asarray, inputs))


def assert_all_close(actual, expected, dtype="float32"):
    for name, array in actual.items():
        kind = "gradient" if name.startswith("grad") else "scan"
        assert_close(array, expected[name], kind, dtype)


@pytest.mark.parametrize(
    ("implementation", "length"),
    [(name, length) for name in (None, *ANY_LENGTH) for length in (1, 7, 128, 1000)]
    + [("one_step", 1)],
)
def test_values_and_gradients(implementation, length):
    inputs = random_inputs(length)
    assert_all_close(run(implementation, inputs), definitions.rg_lru(*inputs))


@pytest.mark.parametrize("implementation", ANY_LENGTH)
@pytest.mark.parametrize("case", ["rglru_real", "rglru_gradient_clip"])
def test_golden(case, implementation):
    """The layer: block-diagonal gates around the op, every parameter's gradient."""
    data = np.load(GOLDEN / case / "data.npz")
    params = load_file(GOLDEN / case / "params.safetensors")
    quantity = "scan" if case == "rglru_real" else "rg_lru_gradient_clip"

    def gate(x, weights, biases):
        blocks = x.reshape(*x.shape[:2], *biases.shape)
        logits = jnp.einsum("btni,nij->btnj", blocks, weights) + biases[None, None]
        return logits.reshape(x.shape)

    @jax.jit
    def layer(params, x, h0, positions):
        def loss(params, x, h0):
            y, h_last = rg_lru(
                x,
                gate(x, params["a_gate/w"], params["a_gate/b"]),
                gate(x, params["input_gate/w"], params["input_gate/b"]),
                params["a_param"],
                positions,
                h0,
                implementation=implementation,
            )
            total = jnp.sum(y * data["cotangent_y"])
            return total + jnp.sum(h_last * data["cotangent_last"]), (y, h_last)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(params, x, h0)

    for prefix in ["continuing_no_h0", "continuing_with_h0", "documents_with_h0"]:
        h0 = data["h0"] if prefix.endswith("with_h0") else np.zeros_like(data["h0"])
        positions = data["segment_pos_" + prefix.split("_")[0]]
        (grad_params, grad_x, grad_h0), (y, h_last) = layer(
            params, data["x"], h0, positions
        )
        actual = {"y": y, "last": h_last, "grad_x": grad_x}
        if prefix.endswith("with_h0"):
            actual["grad_h0"] = grad_h0
        actual |= {f"grad/{name}": array for name, array in grad_params.items()}
        for name, array in actual.items():
            assert_close(array, data[f"{prefix}/{name}"], quantity)


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_dtypes(implementation):
    x, r, i, a_param, positions, *rest = random_inputs(128)
    x, r, i = (jnp.asarray(array, jnp.bfloat16) for array in (x, r, i))
    inputs = (x, r, i, a_param, positions, *rest)
    actual = run(implementation, inputs)
    for name in ("y", "grad_x", "grad_recurrence_logits", "grad_input_logits"):
        assert actual[name].dtype == jnp.bfloat16, name
    for name in ("h_last", "grad_a_param", "grad_h0"):
        assert actual[name].dtype == jnp.float32, name
    expected = definitions.rg_lru(*inputs)
    assert_close(actual.pop("h_last"), expected["h_last"], "scan")
    assert_all_close(actual, expected, "bfloat16")


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_starts_and_holds_are_exact(implementation):
    """A start forgets what came before, a held step changes nothing: to the bit."""
    x, r, i, a_param, _, h0, *_ = map(jnp.asarray, random_inputs(7))
    op = jax.jit(lambda *arrays: rg_lru(*arrays, implementation=implementation))
    positions = jnp.asarray([[8, 9, -1, -1, 0, 1, 2]] * B, jnp.int32)
    y, h_last = op(x, r, i, a_param, positions, h0)
    np.testing.assert_array_equal(y[:, 3], y[:, 1])
    changed = x.at[:, :4].add(1.0)
    y_changed, last_changed = op(changed, r, i, a_param, positions, h0 + 1.0)
    np.testing.assert_array_equal(y_changed[:, 4:], y[:, 4:])
    np.testing.assert_array_equal(last_changed, h_last)
    assert not np.array_equal(y_changed[:, :4], y[:, :4])
    _, held = op(x, r, i, a_param, jnp.full_like(positions, -1), h0)
    np.testing.assert_array_equal(held, h0)


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_finite_at_extreme_gates(implementation):
    """Decays that round to one and to zero: the derivative of the root is bounded."""
    *inputs, y_cotangent, last_cotangent = random_inputs(7)
    inputs[1] = np.where(inputs[1] > 0, 100.0, -100.0).astype(np.float32)
    inputs[2] = np.where(inputs[2] > 0, 100.0, -100.0).astype(np.float32)
    inputs[3] = np.linspace(-100, 100, E).astype(np.float32)
    for name, array in run(
        implementation, (*inputs, y_cotangent, last_cotangent)
    ).items():
        assert np.isfinite(array).all(), name


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_input_factor_keeps_its_digits_near_decay_one(implementation):
    """1 - a^2 is 1e-5 here: computed as it stands, float32 leaves it two digits."""
    x, r, i, a_param, positions, h0, *cotangents = random_inputs(1)
    a_param, positions = np.full_like(a_param, -14), np.ones_like(positions)
    arguments = (1e3 * x, r, i, a_param, positions, 0 * h0)
    y, _ = rg_lru(*map(jnp.asarray, arguments), implementation=implementation)
    assert_close(y, definitions.rg_lru(*arguments, *cotangents)["y"], "scan")


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_split_invariance_and_transformations(implementation):
    """Chunks with the state between them, under vmap and remat, are one call."""
    inputs = random_inputs(128)
    split = 51

    def op(x, r, i, a_param, positions, h0):
        @jax.checkpoint
        def row(x, r, i, positions, h0):
            sequence, h, parts = (x, r, i, positions), h0[None], []
            for chunk in (slice(None, split), slice(split, None)):
                x, r, i, p = (array[None, chunk] for array in sequence)
                y, h = rg_lru(x, r, i, a_param, p, h, implementation=implementation)
                parts.append(y)
            return jnp.concatenate(parts, axis=1)[0], h[0]

        return jax.vmap(row)(x, r, i, positions, h0)

    compiled = jax.jit(lambda *arrays: evaluate(op, *arrays))
    first, second = compiled(*inputs), compiled(*inputs)
    assert_all_close(first, definitions.rg_lru(*inputs))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_errors():
    x, r, i, a_param, positions, h0, *_ = map(jnp.asarray, random_inputs(7))
    for arguments, message in [
        ((x[0], r, i, a_param, positions), r"x: expected shape \[B, T, E\]"),
        ((x, r[:, 1:], i, a_param, positions), "recurrence_gate: expected floating"),
        ((x, r, i, a_param[1:], positions), r"a_param: expected floating \(13,\)"),
        ((x, r, i, a_param, positions[:, 1:]), r"positions: expected integer \(3, 7"),
        ((x, r, i, a_param, positions.astype(jnp.float32)), "positions: .* got float"),
        ((x, r, i, a_param, positions, h0[:1]), r"h0: expected float32 \(3, 13\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            rg_lru(*arguments)
    with pytest.raises(NotImplementedError, match="expected one of composed, one_"):
        rg_lru(x, r, i, a_param, positions, implementation="fused")


def test_the_scan_of_the_composed_form_has_a_name():
    """The name reaches the scan in both directions; what has no such scan refuses it."""
    x, r, i, a_param, positions, *_ = map(jnp.asarray, random_inputs(64))

    def text(**names):
        def loss(x, r):
            y, h_last = rg_lru(x, r, i, a_param, positions, **names)
            return jnp.sum(y) + jnp.sum(h_last)

        return jax.jit(jax.grad(loss, (0, 1))).lower(x, r).as_text()

    assert text().count("stablehlo.while") == 2  # One loop in each direction.
    assert "stablehlo.while" not in text(linear_scan="associative")
    assert text(linear_scan="reference").count("stablehlo.while") == 2
    # What keeps the summaries of groups apart is in the chunked form alone.
    barrier = "stablehlo.optimization_barrier"
    assert barrier not in text(linear_scan="associative")
    chunked = text(linear_scan="chunked").count(barrier)
    named = text(implementation="composed", linear_scan="chunked")
    assert chunked == named.count(barrier) == 6
    for other in ("reference", "pallas_tpu", "pallas_gpu"):
        with pytest.raises(NotImplementedError, match="is for the implementation 'co"):
            text(implementation=other, linear_scan="associative")
    with pytest.raises(NotImplementedError, match="^linear_scan: expected one of .*"):
        text(linear_scan="fastest")


def test_the_reference_differentiates_in_every_mode():
    x, r, i, a_param, positions, h0, *_ = map(jnp.asarray, random_inputs(7))

    def loss(scale):
        y, h_last = rg_lru(
            *(x, r * scale, i, a_param * scale, positions, h0),
            implementation="reference",
        )
        return jnp.sum(y**2) + jnp.sum(h_last)

    @jax.jit
    def derivatives(scale):
        forward_over_reverse = jax.jvp(jax.grad(loss), (scale,), (scale,))[1]
        first = jax.grad(loss)(scale), jax.jacfwd(loss)(scale)
        return *first, jax.grad(jax.grad(loss))(scale), forward_over_reverse

    first, forward_first, second, forward_second = derivatives(1.0)
    assert_close(forward_first, first, "gradient")
    assert_close(forward_second, second, "gradient")
