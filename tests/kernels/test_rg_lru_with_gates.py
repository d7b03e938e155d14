"""The contract of `rg_lru` from the parameters of its gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from recurrentgemma.kernels import Gate, rg_lru
from recurrentgemma.kernels.linear_scan import block_sizes
from recurrentgemma.kernels.rg_lru import IMPLEMENTATIONS
from recurrentgemma.kernels.rg_lru import with_gates_pallas_tpu as kernels
from recurrentgemma.kernels.rg_lru.gates import Inputs
from tests.kernels import definitions
from tests.kernels.watched import watched
from tests.tolerances import assert_close

NAMES = ("x", "r_kernel", "r_bias", "i_kernel", "i_bias", "a_param", "positions", "h0")
DIFFERENTIATED = tuple(i for i, name in enumerate(NAMES) if name != "positions")
B, GROUPS, BLOCK = 2, 2, 128
ANY_LENGTH = [name for name in IMPLEMENTATIONS if name != "one_step"]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So that few steps are several blocks of time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes, "MAX_STEPS", 16)
        jax.clear_caches()
        yield
    jax.clear_caches()


def random_inputs(length, dtype="float32", seed=0):
    """Arguments and two cotangents; documents start and rows are held anywhere."""
    rng = np.random.default_rng(seed)
    kind = rng.random((B, length))
    positions = np.where(kind < 0.1, 0, np.where(kind < 0.2, -1, 5)).astype(np.int32)
    width = GROUPS * BLOCK
    x, y_cotangent = rng.normal(size=(2, B, length, width)).astype(np.float32)
    h0, last_cotangent = rng.normal(size=(2, B, width)).astype(np.float32)
    gates = []
    for _ in range(2):
        kernel = rng.normal(size=(GROUPS, BLOCK, BLOCK), scale=BLOCK**-0.5)
        bias = rng.normal(size=(GROUPS, BLOCK), scale=0.3)
        gates += [kernel.astype(np.float32), bias.astype(np.float32)]
    a_param = rng.uniform(-9, 1, width).astype(np.float32)
    x, gates[0], gates[2] = (jnp.asarray(a, dtype) for a in (x, gates[0], gates[2]))
    arguments = (x, *gates, a_param, positions, h0)
    return (*arguments, y_cotangent, last_cotangent)


def op(implementation, x, r_kernel, r_bias, i_kernel, i_bias, *rest):
    gates = Gate(r_kernel, r_bias), Gate(i_kernel, i_bias)
    return rg_lru(x, *gates, *rest, implementation=implementation)


def run(implementation, inputs):
    """Values and gradients by name."""

    def loss(*inputs):
        *arguments, y_cotangent, last_cotangent = inputs
        y, h_last = op(implementation, *arguments)
        total = jnp.sum(y.astype(jnp.float32) * y_cotangent)
        return total + jnp.sum(h_last * last_cotangent), {"y": y, "h_last": h_last}

    compute = jax.jit(jax.grad(loss, DIFFERENTIATED, has_aux=True))
    gradients, values = compute(*map(jnp.asarray, inputs))
    names = (f"grad_{NAMES[i]}" for i in DIFFERENTIATED)
    return values | dict(zip(names, gradients, strict=True))


def assert_all_close(actual, expected, dtype="float32"):
    for name, array in actual.items():
        kind = "gradient" if name.startswith("grad") else "scan"
        assert_close(array, expected[name], kind, dtype)


@pytest.mark.parametrize(
    ("implementation", "length"),
    [(name, length) for name in (None, *ANY_LENGTH) for length in (1, 7, 50)]
    + [("one_step", 1)],
)
def test_values_and_gradients(implementation, length):
    inputs = random_inputs(length)
    expected = definitions.rg_lru_with_gates(*inputs)
    assert_all_close(run(implementation, inputs), expected)


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_bfloat16(implementation):
    inputs = random_inputs(32, "bfloat16")
    actual = run(implementation, inputs)
    for name, array in actual.items():
        narrow = name in ("y", "grad_x", "grad_r_kernel", "grad_i_kernel")
        assert array.dtype == (jnp.bfloat16 if narrow else jnp.float32), name
    expected = definitions.rg_lru_with_gates(*inputs)
    assert_all_close(actual, expected, "bfloat16")


@pytest.mark.parametrize("implementation", ANY_LENGTH)
def test_split_invariance_and_transformations(implementation):
    """Chunks with the state between them, under vmap and remat, are one call."""
    *arguments, _, _ = map(jnp.asarray, random_inputs(40))
    x, *gates, a_param, positions, h0 = arguments

    @jax.checkpoint
    def row(x, positions, h0):
        h, parts = h0[None], []
        for chunk in (slice(None, 13), slice(13, None)):
            sequences = x[None, chunk], *gates, a_param, positions[None, chunk], h
            y, h = op(implementation, *sequences)
            parts.append(y)
        return jnp.concatenate(parts, axis=1)[0], h[0]

    split = jax.jit(jax.vmap(row))(x, positions, h0)
    whole = jax.jit(lambda *arrays: op(implementation, *arrays))(*arguments)
    for actual, expected in zip(split, whole, strict=True):
        assert_close(actual, expected, "scan")


@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_kernels_on_two_cores(monkeypatch, capfd, dtype):
    """Several blocks of rows, of channels and of time, whose last one is partial.

    No races, no memory that nobody wrote, and nothing from past the end. A slow channel's
    gradients are small: they are compared with the largest one of their channel, and
    those of a_param, which has one a channel, without their factor d softplus.
    """
    monkeypatch.setattr(block_sizes, "MAX_WIDTH", BLOCK)
    monkeypatch.setattr(block_sizes, "ROW_CHANNELS", BLOCK)
    given = random_inputs(19, dtype)
    *arguments, y_gradient, last_gradient = map(jnp.asarray, given)
    x, *gates, a_param, positions, h0 = arguments
    gates = Gate(*gates[:2]), Gate(*gates[2:])
    inputs = Inputs(x, *gates, a_param, positions, h0)
    with watched(capfd) as interpret:
        y, h_last = kernels.recurrence(inputs, interpret=interpret)
        upstream = y_gradient.astype(dtype), last_gradient
        gradients = kernels.gradients(
            (inputs,), (y, None), upstream, interpret=interpret
        )
    expected = definitions.rg_lru_with_gates(*given)
    assert_all_close({"y": y, "h_last": h_last}, expected, dtype)
    leaves = jax.tree.leaves(gradients)
    for index, gradient in zip(DIFFERENTIATED, leaves, strict=True):
        name, reference = NAMES[index], expected[f"grad_{NAMES[index]}"]
        factor = jax.nn.sigmoid(a_param) if name == "a_param" else jnp.ones(())
        quantity = "channel_gradient" if gradient.ndim == 3 else "gradient"
        assert_close(gradient / factor, reference / factor, quantity, dtype)


def test_gate_blocks_are_sharded_with_their_channels():
    inputs = random_inputs(20)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(inputs[0], NamedSharding(mesh, P("data", None, "model")))
    with jax.set_mesh(mesh):
        actual = run("pallas_tpu", (x, *inputs[1:]))
        text = lowered(tuple(map(jnp.asarray, inputs[:-2])))
    assert_all_close(actual, definitions.rg_lru_with_gates(*inputs))
    calls = [line for line in text.splitlines() if "@tpu_custom_call" in line]
    assert len(calls) == 2
    assert all("tensor<1x20x128xf32>, tensor<1x128x128xf32>" in c for c in calls)


def lowered(arguments, platform="tpu"):
    def loss(*arguments):
        y, h_last = op(None, *arguments)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(h_last)

    traced = jax.jit(jax.grad(loss, DIFFERENTIATED)).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_choice():
    """One kernel forward and one backward on TPU, where gate blocks are whole tiles."""
    *arguments, _, _ = map(jnp.asarray, random_inputs(20, "bfloat16"))
    text = lowered(arguments)
    assert text.count("@tpu_custom_call") == 2
    assert 'kernel_name = "rg_lru_with_gates_gradient"' in text
    assert "tpu_custom_call" not in lowered(arguments, "cpu")
    narrow = [
        jnp.resize(array, (4, 64, 64) if array.ndim == 3 else (4, 64))
        for array in arguments[1:5]
    ]
    text = lowered([arguments[0], *narrow, *arguments[5:]])
    assert 'kernel_name = "rg_lru_gradient"' in text
    with pytest.raises(NotImplementedError, match="must be multiples of 128 wide, not"):
        op("pallas_tpu", arguments[0], *narrow, *arguments[5:])


def test_errors():
    *arguments, _, _ = map(jnp.asarray, random_inputs(7))
    x, r_kernel, r_bias, *rest = arguments
    for changed, message in [
        ((x[0], r_kernel, r_bias, *rest), r"x: expected shape \[B, T, E\]"),
        ((x, r_kernel[:1], r_bias, *rest), r"recurrence_gate\.kernel: expected float"),
        ((x, r_kernel.astype(int), r_bias, *rest), "recurrence_gate.* got int32"),
        ((x, r_kernel, r_bias, *rest[:2], rest[2][1:], *rest[3:]), "a_param: exp"),
    ]:
        with pytest.raises(ValueError, match=message):
            op(None, *changed)
    with pytest.raises(ValueError, match="input_gate: expected parameters or logits"):
        rg_lru(x, Gate(r_kernel, r_bias), x, *rest[2:])
