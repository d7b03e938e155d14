"""The contract of `rg_lru_with_gates`, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.kernels import Gate, rg_lru_with_gates
from recurrentgemma.kernels.rg_lru.with_gates import IMPLEMENTATIONS
from tests.kernels import definitions
from tests.tolerances import assert_close

NAMES = ("x", "r_kernel", "r_bias", "i_kernel", "i_bias", "a_param", "positions", "h0")
B, G, BLOCK = 2, 2, 128
E = G * BLOCK


def random_inputs(length, groups=G, seed=0):
    """Arguments and two cotangents; documents start and rows are held anywhere."""
    rng = np.random.default_rng(seed)
    kind = rng.random((B, length))
    width = groups * BLOCK
    positions = np.where(kind < 0.1, 0, np.where(kind < 0.2, -1, 5)).astype(np.int32)
    x, y_cotangent = rng.normal(size=(2, B, length, width)).astype(np.float32)
    kernels = rng.normal(size=(2, groups, BLOCK, BLOCK), scale=BLOCK**-0.5)
    biases = rng.normal(size=(2, groups, BLOCK), scale=0.3)
    h0, last_cotangent = rng.normal(size=(2, B, width)).astype(np.float32)
    gates = (
        array.astype(np.float32) for pair in zip(kernels, biases) for array in pair
    )
    a_param = rng.uniform(-9, 1, width).astype(np.float32)
    arguments = (x, *gates, a_param, positions, h0)
    return (*arguments, y_cotangent, last_cotangent)


def run(implementation, inputs):
    """Values and gradients by name."""
    differentiated = tuple(i for i, name in enumerate(NAMES) if name != "positions")

    def loss(*inputs):
        x, r_kernel, r_bias, i_kernel, i_bias, *rest, y_cotangent, last_cotangent = (
            inputs
        )
        y, h_last = rg_lru_with_gates(
            x,
            Gate(r_kernel, r_bias),
            Gate(i_kernel, i_bias),
            *rest,
            implementation=implementation,
        )
        total = jnp.sum(y.astype(jnp.float32) * y_cotangent)
        return total + jnp.sum(h_last * last_cotangent), {"y": y, "h_last": h_last}

    compute = jax.jit(jax.grad(loss, differentiated, has_aux=True))
    gradients, values = compute(*map(jnp.asarray, inputs))
    names = (f"grad_{NAMES[i]}" for i in differentiated)
    return values | dict(zip(names, gradients, strict=True))


def assert_all_close(actual, expected, dtype="float32"):
    for name, array in actual.items():
        kind = "gradient" if name.startswith("grad") else "scan"
        assert_close(array, expected[name], kind, dtype)


@pytest.mark.parametrize("length", [1, 7, 130])
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_values_and_gradients(implementation, length):
    inputs = random_inputs(length)
    expected = definitions.rg_lru_with_gates(*inputs)
    assert_all_close(run(implementation, inputs), expected)
