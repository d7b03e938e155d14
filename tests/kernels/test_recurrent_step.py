"""The contract of `recurrent_step`, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recurrentgemma.blocks.recurrent import RecurrentBlock
from recurrentgemma.chunk import Chunk
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.kernels import StepParameters, recurrent_step
from recurrentgemma.kernels.recurrent_step import IMPLEMENTATIONS, pallas_tpu
from recurrentgemma.kernels.rg_lru.gates import Gate
from tests.kernels import definitions
from tests.kernels.watched import watched
from tests.tolerances import assert_close

B, BLOCKS, BLOCK, TAPS = 5, 2, 128, 4
E = BLOCKS * BLOCK
ALL = [None, *IMPLEMENTATIONS]


def random_inputs(batch=B, taps=TAPS, seed=0):
    """The arguments: starts, held rows, and convolutions that reach before a start."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    gates = [
        Gate(normal(BLOCKS, BLOCK, BLOCK, scale=BLOCK**-0.5), normal(BLOCKS, BLOCK))
        for _ in range(2)
    ]
    a_param = jnp.asarray(rng.uniform(-9, 1, E), jnp.float32)
    parameters = StepParameters(normal(taps, E), normal(E), *gates, a_param)
    positions = jnp.asarray(np.resize([7, 0, -1, 1, 2], batch), jnp.int32)
    state = normal(batch, E), normal(batch, taps - 1, E)
    return normal(batch, E), parameters, positions, *state


def by_name(parameters):
    """The leaves of `StepParameters`, as `definitions.recurrent_step` names them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parameters)
    return {"_".join(key.name for key in path): leaf for path, leaf in leaves}


def cotangents(results):
    return [
        jnp.asarray(np.random.default_rng(i).normal(size=result.shape), jnp.float32)
        for i, result in enumerate(results)
    ]


def evaluate(inputs, implementation):
    """Values and gradients by name."""
    x, parameters, positions, h, conv_state = inputs

    def run(x, parameters, h, conv_state):
        return recurrent_step(
            *(x, parameters, positions, h, conv_state), implementation=implementation
        )

    @jax.jit
    def values_and_gradients(*arguments):
        # Apart: a derivative may take another way to the values.
        values, (_, pull_back) = run(*arguments), jax.vjp(run, *arguments)
        upstream = [
            c.astype(v.dtype) for c, v in zip(cotangents(values), values, strict=True)
        ]
        return values, pull_back(tuple(upstream))

    values, gradients = values_and_gradients(x, parameters, h, conv_state)
    gradients = dict(zip(("x", "p", "h", "conv_state"), gradients, strict=True))
    gradients |= by_name(gradients.pop("p"))
    named = dict(zip(("y", "h", "conv_state"), values, strict=True))
    return named | {f"grad_{name}": array for name, array in gradients.items()}


def define(inputs):
    x, parameters, positions, h, conv_state = jax.tree.map(np.asarray, inputs)
    upstream = cotangents((x, h, conv_state))
    return definitions.recurrent_step(
        x, by_name(parameters), positions, h, conv_state, *upstream
    )


@pytest.mark.parametrize("taps", [2, TAPS])
@pytest.mark.parametrize("implementation", ALL)
def test_values_and_gradients(implementation, taps):
    inputs = random_inputs(taps=taps)
    actual, expected = evaluate(inputs, implementation), define(inputs)
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        kind = "gradient" if name.startswith("grad") else "scan"
        assert_close(array, expected[name], kind)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_starts_and_holds_are_exact(implementation):
    """A start forgets what came before, a held row keeps it: to the bit."""
    x, parameters, positions, h, conv_state = random_inputs()
    step = jax.jit(lambda *a: recurrent_step(*a, implementation=implementation))
    start, hold = positions == 0, positions < 0
    first = step(x, parameters, positions, h, conv_state)
    second = step(x, parameters, positions, h + 1, conv_state + 1)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a[start], b[start])
        assert np.any(np.asarray(a != b)[~start])
    np.testing.assert_array_equal(first[1][hold], h[hold])
    np.testing.assert_array_equal(first[2][hold], conv_state[hold])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ALL)
def test_steps_are_a_chunk(implementation, dtype):
    """The recurrent block token by token, and on documents with padding at once."""
    config = GriffinConfig(
        vocab_size=8,
        width=16,
        mlp_width=16,
        num_layers=1,
        block_pattern=("recurrent",),
        num_heads=1,
        head_dim=16,
        lru_width=E,
        num_gate_blocks=BLOCKS,
    )
    runtime = Runtime(compute_dtype=dtype, recurrent_step=implementation)
    block = RecurrentBlock(config, runtime, rngs=nnx.Rngs(0))
    positions = [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, -1, -1, -1]]
    positions = np.array(positions, np.int32)
    x = np.random.default_rng(0).normal(size=(*positions.shape, config.width))
    x = jnp.asarray(x, dtype)

    @jax.jit
    def read(block, x, positions, state):
        lengths = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        next_position = jnp.max(positions[:, -1:], axis=1) + 1
        if positions.shape[1] > 1:
            next_position = jnp.array([3, 2], jnp.int32)
        return block(x, Chunk(positions, lengths, next_position, None), state)

    expected, last = read(block, x, positions, block.init_state(len(x)))
    state, outputs = block.init_state(len(x)), []
    for t in range(x.shape[1]):
        now = slice(t, t + 1)
        y, state = read(block, x[:, now], positions[:, now], state)
        outputs.append(y)
    actual = np.concatenate(outputs, axis=1)
    assert actual.dtype == expected.dtype == jnp.dtype(dtype)
    assert state.conv.dtype == last.conv.dtype and state.h.dtype == jnp.float32
    read_tokens = positions >= 0
    assert_close(actual[read_tokens], expected[read_tokens], "scan", dtype)
    assert_close(state.h, last.h, "scan", dtype)
    assert_close(state.conv, last.conv, "scan", dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap(implementation):
    x, parameters, *rest = random_inputs()

    def row(*arrays):
        x, positions, h, conv_state = (array[None] for array in arrays)
        results = recurrent_step(
            *(x, parameters, positions, h, conv_state), implementation=implementation
        )
        return [result[0] for result in results]

    actual = jax.jit(jax.vmap(row))(x, *rest)
    expected = recurrent_step(x, parameters, *rest, implementation="reference")
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "scan")


@pytest.mark.parametrize("batch", [4, 3])
def test_the_kernel_under_a_mesh(batch):
    """Rows over "data" where they divide, gate blocks and channels over "model"."""
    x, parameters, *rest = random_inputs(batch)
    expected = recurrent_step(x, parameters, *rest, implementation="reference")
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    step = jax.jit(lambda *a: recurrent_step(*a, implementation="pallas_tpu"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "model")))
        actual = step(placed, parameters, *rest)
        text = step.trace(x, parameters, *rest).lower(lowering_platforms=("tpu",))
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, "scan")
    [call] = [line for line in text.as_text().splitlines() if "tpu_custom_call" in line]
    rows = batch // 2 if batch % 2 == 0 else batch
    assert f"tensor<{rows}x{E // 2}xf32>" in call
    assert f"tensor<{BLOCKS // 2}x{BLOCK}x{BLOCK}xf32>" in call


@pytest.mark.parametrize(("batch", "races"), [(21, False), (32, True)])
def test_the_kernel_over_many_blocks(monkeypatch, capfd, batch, races):
    """Blocks of rows (the last one partial) and of gates; who writes what, and when."""
    monkeypatch.setattr(pallas_tpu, "TILE_ROWS", 8)
    monkeypatch.setattr(pallas_tpu, "MAX_ROWS", 16)
    monkeypatch.setattr(pallas_tpu, "MATRIX_BYTES", 0)
    jax.clear_caches()
    inputs = random_inputs(batch)
    with watched(capfd, races) as interpret:
        results = pallas_tpu.step(*inputs, interpret=interpret)
    expected = define(inputs)
    for name, array in zip(("y", "h", "conv_state"), results, strict=True):
        assert_close(array, expected[name], "scan")
    jax.clear_caches()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_donated_states_are_updated_in_place(implementation):
    *arguments, h, conv_state = random_inputs()
    step = jax.jit(
        lambda *a: recurrent_step(*a, implementation=implementation),
        donate_argnums=(3, 4),
    )
    memory = step.lower(*arguments, h, conv_state).compile().memory_analysis()
    assert memory.alias_size_in_bytes == h.nbytes + conv_state.nbytes


def test_errors():
    x, parameters, positions, h, conv_state = random_inputs()
    gate = parameters.input_gate
    narrow = parameters._replace(input_gate=gate._replace(bias=gate.bias[:, 1:]))
    short = parameters._replace(conv_kernel=parameters.conv_kernel[1:])
    for arguments, message in [
        ((x[:, None], parameters, positions, h, conv_state), r"x: expected shape \[B"),
        ((x, narrow, positions, h, conv_state), r"input_gate\.bias: expected float"),
        ((x, short, positions, h, conv_state), r"conv_state: expected .*5, 2, 256"),
        ((x, parameters, positions[1:], h, conv_state), r"positions: expected .*\(5,"),
        ((x, parameters, h[:, 0], h, conv_state), "positions: expected integer"),
        (
            (x, parameters, positions, h.astype(x.dtype)[:1], conv_state),
            "h: expected float32",
        ),
        (
            (x, parameters, positions, h.astype(jnp.bfloat16), conv_state),
            "h: expected fl",
        ),
        (
            (x, parameters, positions, h, conv_state.astype(jnp.bfloat16)),
            "conv_state: expected float32 .* got bfloat16",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            recurrent_step(*arguments)


def test_refused_by_name():
    x, parameters, *rest = random_inputs()
    with pytest.raises(NotImplementedError, match="expected one of pallas_tpu, ref"):
        recurrent_step(x, parameters, *rest, implementation="fused")

    def gates(blocks, block):
        return [Gate(jnp.ones((blocks, block, block)), jnp.ones((blocks, block)))] * 2

    one_tap = parameters._replace(conv_kernel=parameters.conv_kernel[:1])
    for changed, message in [
        (parameters._replace(a_param=parameters.a_param.astype("float16")), "it takes"),
        (StepParameters(*parameters[:2], *gates(4, 64), parameters[4]), "not 64"),
        (one_tap, "at least two taps"),
    ]:
        *states, conv = rest
        conv = conv[:, : len(changed.conv_kernel) - 1]
        arguments = (x, changed, *states, conv)
        with pytest.raises(NotImplementedError, match=f"cannot run: .*{message}"):
            recurrent_step(*arguments, implementation="pallas_tpu")
        recurrent_step(*arguments)
