"""float32 operands are multiplied as float32, in every op, kernel and gradient."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision

from recurrentgemma.kernels import (
    Gate,
    KVCache,
    StepParameters,
    local_attention,
    recurrent_step,
    rg_lru,
)
from recurrentgemma.kernels.local_attention import ring, splash
from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings
from recurrentgemma.kernels.precision import custom_vjp, einsum_float32
from recurrentgemma.kernels.recurrent_step import pallas_tpu as step_kernel
from recurrentgemma.kernels.rg_lru import with_gates_pallas_tpu as gate_kernels
from recurrentgemma.kernels.rg_lru.gates import Inputs

B, T, BLOCK = 2, 16, 128


def recurrence(dtype):
    """An op of x, and x."""
    gate = Gate(jnp.ones((2, BLOCK, BLOCK), dtype), jnp.ones((2, BLOCK)))
    positions = jnp.ones((B, T), jnp.int32)

    def op(x):
        rest = gate, gate, jnp.ones(2 * BLOCK), positions
        return rg_lru(x, *rest, implementation="composed")[0]

    return op, jnp.ones((B, T, 2 * BLOCK), dtype)


def step(dtype):
    gate = Gate(jnp.ones((2, BLOCK, BLOCK), dtype), jnp.ones((2, BLOCK)))
    vector = jnp.ones(2 * BLOCK)
    taps = jnp.ones((4, 2 * BLOCK), dtype)
    parameters = StepParameters(taps, vector, gate, gate, vector)
    h = jnp.ones((B, 2 * BLOCK))
    state = jnp.ones((B, 3, 2 * BLOCK), dtype)

    def op(x):
        rest = parameters, jnp.ones(B, jnp.int32), h, state
        return recurrent_step(x, *rest, implementation="reference")[0]

    return op, h.astype(dtype)


def attention(dtype, implementation="blocked", length=T):
    keys = jnp.ones((B, length, 1, BLOCK), dtype)
    ring = jnp.ones((B, 8, 1, BLOCK), dtype)
    cache = KVCache(ring, ring, jnp.ones((B, 8), jnp.int32))
    positions = jnp.full((B, length), 9, jnp.int32)

    def op(q):
        return local_attention(
            *(q, keys, keys),
            positions=positions,
            cache=cache,
            window=8,
            scale=1.0,
            soft_cap=None,
            implementation=implementation,
        )[0]

    return op, jnp.ones((B, length, 2, BLOCK), dtype)


PLAIN = {
    "recurrence": recurrence,
    "step": step,
    "attention": attention,
    "attention's definition": lambda dtype: attention(dtype, "reference"),
    "attention of one query": lambda dtype: attention(dtype, length=1),
}


def precisions(op, x, platform, ambient, *, gradient=False):
    """Of each product of a program for a platform."""

    def loss(x):
        with jax.default_matmul_precision(ambient):
            y = op(x)
        return jnp.sum(y.astype(jnp.float32))

    function = jax.grad(loss) if gradient else loss
    lowered = jax.jit(function).trace(x).lower(lowering_platforms=(platform,))
    products = re.findall(r"dot_general .*", lowered.as_text())
    return [re.findall(r"precision = \[(\w+), (\w+)\]", text)[0] for text in products]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("op", PLAIN)
def test_float32_is_float32_unless_the_caller_says_otherwise(op, platform):
    made = PLAIN[op]("float32")
    forward = precisions(*made, platform, None)
    both = precisions(*made, platform, None, gradient=True)
    assert len(both) > len(forward) > 0
    assert set(both) == set(forward) == {("HIGHEST", "HIGHEST")}
    faster = precisions(*made, platform, "high", gradient=True)
    assert len(faster) == len(both) and set(faster) == {("HIGH", "HIGH")}


@pytest.mark.parametrize("op", [op for op in PLAIN if "definition" not in op])
def test_bfloat16_is_bfloat16_whatever_the_caller_says(op):
    for ambient in (None, "highest"):
        found = precisions(*PLAIN[op]("bfloat16"), "tpu", ambient, gradient=True)
        assert set(found) == {("DEFAULT", "DEFAULT")}


def kernel_products(function, *arguments):
    """Precision of each product in the Pallas kernels of a function."""
    found = []

    def walk(jaxpr, inside):
        for equation in jaxpr.eqns:
            within = inside or equation.primitive.name == "pallas_call"
            if inside and equation.primitive.name == "dot_general":
                found.append(equation.params["precision"])
            for inner in jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"),
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner, within)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr, inside=False)
    return {precision[0] if precision else Precision.DEFAULT for precision in found}


def kernel_calls(dtype):
    """Every kernel with products, forward and backward, with its arguments."""
    x = jnp.ones((B, T, 2 * BLOCK), dtype)
    h = jnp.ones((B, 2 * BLOCK))
    vector = jnp.ones(2 * BLOCK)
    gate = Gate(jnp.ones((2, BLOCK, BLOCK), dtype), jnp.ones((2, BLOCK)))
    inputs = Inputs(x, gate, gate, vector, jnp.ones((B, T), jnp.int32), h)
    yield gate_kernels.recurrence, (inputs,)
    yield gate_kernels.gradients, ((inputs,), (x, None), (x, h))

    taps, state = jnp.ones((4, 2 * BLOCK), dtype), jnp.ones((B, 3, 2 * BLOCK), dtype)
    parameters = StepParameters(taps, vector, gate, gate, vector)
    positions = jnp.ones(B, jnp.int32)
    yield step_kernel.step, (x[:, 0], parameters, positions, h, state)

    q, k = jnp.ones((B, T, 2, BLOCK), dtype), jnp.ones((B, T, 1, BLOCK), dtype)
    chunk = Chunk(q, k, k, jnp.ones((B, T), jnp.int32), ring.empty(k, k, 0))
    settings = Settings(window=8, scale=1.0, soft_cap=None)
    yield partial(splash.attend, settings=settings), (chunk,)
    results = q, jnp.ones((B, T, 2))
    yield partial(splash.gradients, settings=settings), ((chunk,), results, results)


@pytest.mark.parametrize(
    ("dtype", "ambient", "expected"),
    [
        ("float32", None, Precision.HIGHEST),
        ("float32", "high", Precision.HIGHEST),
        ("float32", "default", Precision.DEFAULT),
        ("bfloat16", None, Precision.DEFAULT),
        ("bfloat16", "highest", Precision.DEFAULT),
    ],
)
def test_kernels(dtype, ambient, expected):
    for function, arguments in kernel_calls(dtype):
        with jax.default_matmul_precision(ambient):
            assert kernel_products(function, *arguments) == {expected}


def test_the_gradient_sees_the_precision_of_the_call():
    """Also where the function is traced before it is differentiated."""
    seen = []

    def run(factor, x):
        return factor * x

    def forward(factor, x):
        return run(factor, x), x

    def backward(factor, x, upstream):
        seen.append(jax.config.jax_default_matmul_precision)
        return (einsum_float32("i,i->i", factor * upstream, jnp.ones_like(x)),)

    double = custom_vjp(run, forward, backward, static=(0,))

    @jax.checkpoint
    @jax.jit
    def loss(x):
        with jax.default_matmul_precision("high"):
            return jnp.sum(double(2.0, x))

    gradient = jax.jit(jax.grad(loss))(jnp.ones(3))
    assert seen == ["high"]
    assert gradient.tolist() == [2.0, 2.0, 2.0]
