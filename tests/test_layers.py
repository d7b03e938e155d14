"""Leaf layers against float64 loops and recurrentgemma 1.0.1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from recurrentgemma import Runtime, layers
from recurrentgemma.blocks.mlp import GatedMLP
from recurrentgemma.chunk import Chunk
from recurrentgemma.kernels.rg_lru.gates import Gate, logits
from recurrentgemma.rotary import apply_rotary, rotary_tables
from tests.golden_models import GOLDEN, load_data
from tests.models import random_model, tiny_config
from tests.tolerances import assert_close

FOLDER = GOLDEN / "layers"


def _params(name):
    return load_file(FOLDER / name / "params.safetensors")


def test_rms_norm():
    data, scale = load_data(FOLDER / "rms_norm"), _params("rms_norm")["scale"]
    y, pull = jax.vjp(layers.rms_norm, data["x"], scale)
    assert_close(y, data["y"], "layer")
    four_dims = layers.rms_norm(data["x_four_dims"], scale)
    assert_close(four_dims, data["y_four_dims"], "layer")
    grad_x, grad_scale = pull(data["cotangent_y"])
    assert_close(grad_x, data["grad_x"], "gradient")
    assert_close(grad_scale, data["grad/scale"], "gradient")


def test_rms_norm_in_bfloat16_rounds_once():
    data, scale = load_data(FOLDER / "rms_norm"), _params("rms_norm")["scale"]
    y = layers.rms_norm(data["x"].astype(jnp.bfloat16), scale)
    assert y.dtype == jnp.bfloat16
    exact = layers.rms_norm(
        data["x"].astype(jnp.bfloat16).astype(jnp.float32), scale
    ).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y, exact)


def test_block_diagonal_linear():
    folder = FOLDER / "block_diagonal_linear"
    data, params = load_data(folder), _params("block_diagonal_linear")
    y = logits(data["x"], Gate(params["w"], params["b"]))
    assert_close(y, data["y"], "layer")


def test_gated_mlp():
    data, params = load_data(FOLDER / "gated_mlp"), _params("gated_mlp")
    width, hidden = data["x"].shape[-1], params["ffw_down/kernel"].shape[0]
    config = tiny_config(width=width, mlp_width=hidden)
    mlp: GatedMLP = random_model(config).blocks[0].mlp
    for i, half in enumerate((mlp.gate, mlp.up)):
        half.kernel[...] = params["ffw_up/w"][i]
        half.bias[...] = params["ffw_up/b"][i, 0, 0]
    mlp.down.kernel[...] = params["ffw_down/kernel"]
    mlp.down.bias[...] = params["ffw_down/bias"]
    assert_close(mlp(data["x"]), data["y"], "layer")


def _chunk(positions):
    positions = jnp.asarray(positions, jnp.int32)
    lengths = jnp.full(len(positions), positions.shape[1], jnp.int32)
    return Chunk(positions, lengths, positions[:, -1] + 1, None)


@pytest.mark.parametrize("h0", ["no_h0", "with_h0"])
@pytest.mark.parametrize("positions", ["continuing", "documents"])
def test_complex_rg_lru(positions, h0):
    data, params = load_data(FOLDER / "rglru_complex"), _params("rglru_complex")
    unit = layers.ComplexRGLRU(24, 3, Runtime(), rngs=nnx.Rngs(0))
    unit.a_param[...] = params["a_param"]
    unit.a_imag_param[...] = params["a_imag_param"]
    gates = {"a_gate": unit.recurrence_gate, "input_gate": unit.input_gate}
    for name, gate in gates.items():
        gate.kernel[...] = params[f"{name}/w"]
        gate.bias[...] = params[f"{name}/b"]
    chunk = _chunk(data[f"segment_pos_{positions}"])
    start = data["h0"] if h0 == "with_h0" else np.zeros_like(data["h0"])

    @jax.jit
    def run(unit, x, start):
        def loss(unit, x, start):
            y, last = unit(x, chunk, start)
            total = jnp.sum(y * data["cotangent_y"])
            return total + jnp.sum(last * data["cotangent_last"]), (y, last)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(unit, x, start)

    (grad_unit, grad_x, grad_start), (y, last) = run(unit, data["x"], start)
    expected = {
        name.split("/", 1)[1]: array
        for name, array in data.items()
        if name.startswith(f"{positions}_{h0}/")
    }
    assert_close(y, expected["y"], "layer")
    assert_close(last, expected["last"], "cache")
    gradients = {
        "grad_x": grad_x,
        "grad/a_param": grad_unit.a_param[...],
        "grad/a_imag_param": grad_unit.a_imag_param[...],
        "grad/a_gate/w": grad_unit.recurrence_gate.kernel[...],
        "grad/a_gate/b": grad_unit.recurrence_gate.bias[...],
        "grad/input_gate/w": grad_unit.input_gate.kernel[...],
        "grad/input_gate/b": grad_unit.input_gate.bias[...],
    }
    if h0 == "with_h0":
        gradients["grad_h0"] = grad_start
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], "gradient")


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("documents", ["one_document", "documents"])
def test_causal_conv1d(width, documents):
    name = f"conv1d_width_{width}"
    data, params = load_data(FOLDER / name), _params(name)
    x, positions = data["x"], data[f"segment_pos_{documents}"]
    conv = functools.partial(layers.causal_conv1d, kernel=params["w"], bias=params["b"])
    empty = jnp.zeros((len(x), width - 1, x.shape[-1]))
    for suffix in ("", *(f"_first_{n}" for n in range(1, width + 1))):
        y_true = data[f"{documents}/y{suffix}"]
        length = y_true.shape[1]
        y, state = conv(x[:, :length], chunk=_chunk(positions[:, :length]), state=empty)
        assert_close(y, y_true, "layer")
        # The original keeps the inputs of the document before in a short one's state.
        state_position = positions[:, length - 1 : length] + np.arange(2 - width, 1)
        state_true = data[f"{documents}/cache{suffix}"]
        state_true = np.where((state_position >= 0)[..., None], state_true, 0)
        assert_close(state, state_true, "cache")


@pytest.mark.parametrize("width", [3, 4])
def test_causal_conv1d_steps(width):
    name = f"conv1d_width_{width}"
    data, params = load_data(FOLDER / name), _params(name)
    state = jnp.asarray(data["decode/cache_in"])
    for t in range(data["decode/y"].shape[1]):
        position = np.full((len(state), 1), 100 + t)
        y, state = layers.causal_conv1d(
            data["x"][:, t : t + 1],
            params["w"],
            params["b"],
            _chunk(position),
            state,
        )
        assert_close(y[:, 0], data["decode/y"][:, t], "layer")
        assert_close(state, data["decode/cache_out"][:, t], "cache")


def test_rotary_golden():
    data = load_data(FOLDER / "rope_first_half")
    real = data["positions"] >= 0
    y = apply_rotary(jnp.asarray(data["x"]), rotary_tables(data["positions"], 8))
    # The original's float32 angles are off by 1e-4 beyond position 1000.
    np.testing.assert_allclose(y[real], data["y"][real], atol=1e-4)


@pytest.mark.parametrize("start", [0, 10**6, 10**8, 2**31 - 600])
def test_rotary_phase_is_exact_at_any_position(start):
    positions = start + np.arange(0, 600, 7)
    cos, sin = rotary_tables(jnp.asarray(positions, jnp.int32)[None], 128)
    frequency = 10_000.0 ** (-np.arange(64, dtype=np.longdouble) / 64)
    turn = positions[:, None] * frequency / (2 * np.pi) % 1
    angle = np.asarray(turn * 2 * np.pi, np.float64)
    error = np.angle((cos[0] + 1j * np.asarray(sin[0])) * np.exp(-1j * angle))
    assert np.abs(error).max() < 1e-6


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 64))

    def score(query_position, distance):
        def turn(x, p):
            return apply_rotary(x, rotary_tables(jnp.full((1, 1), p, jnp.int32), 64))

        turned = turn(q, query_position), turn(k, query_position - distance)
        return float(jnp.sum(turned[0] * turned[1]))

    for distance in (1, 77, 2048):
        assert abs(score(10**8, distance) - score(distance, distance)) < 5e-5


def test_initial_decays_are_uniform_in_area_between_the_radii():
    """Griffin, section 2.4: a^c in [0.9, 0.999] at an open gate, with c = 8."""
    unit = layers.RGLRU(4096, 1024, Runtime(), rngs=nnx.Rngs(0))
    a_param = np.asarray(unit.a_param[...], np.float64)
    decay = np.sort(np.exp(-8 * np.log1p(np.exp(a_param))))
    area = (decay**2 - 0.9**2) / (0.999**2 - 0.9**2)
    steps = (np.arange(len(area)) + 0.5) / len(area)
    assert -1e-4 < area[0] < 2e-3 and 0.998 < area[-1] < 1 + 1e-4
    # The largest deviation of so many uniform numbers, exceeded once in 10,000 times.
    assert np.abs(area - steps).max() < 2.2 / len(area) ** 0.5
