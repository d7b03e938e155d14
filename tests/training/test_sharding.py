"""Training on 8 devices equals training on one, whatever the mesh; states move between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from recurrentgemma import Runtime
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.griffin import stack_layers
from recurrentgemma.training import sharding
from recurrentgemma.training.data import Batch
from recurrentgemma.training.mesh import AXES, TYPES, MeshConfig, filled_axes
from recurrentgemma.training.state import Checkpoints, TrainState
from recurrentgemma.training.step import (
    make_evaluation_step,
    make_train_step,
    mean_metrics,
)
from tests import models
from tests.tolerances import assert_close

BATCH, LENGTH = 8, 48
CONFIG = models.tiny_config(
    num_layers=4, block_pattern=("recurrent", "local_attention")
)
OPTIMIZER = optax.adam(1e-2, eps=1e-3)


def batch():
    """Packed documents over the borders of all shards, padding inside and at the end."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1), np.int32)
    positions = np.zeros((BATCH, LENGTH + 1), np.int32)
    for row in positions:
        start = 0
        while start <= LENGTH:
            end = min(start + int(rng.integers(3, 30)), LENGTH + 1)
            row[start:end] = np.arange(end - start)
            start = end
    positions[1, 20:] = -1
    positions[2, 30:35] = -1
    positions[2, 35:] = np.arange(LENGTH - 34)
    mask = (positions[:, 1:] > 0) & (positions[:, :-1] >= 0)
    return Batch(
        tokens[:, :-1], positions[:, :-1], tokens[:, 1:], mask.astype(np.float32)
    )


@pytest.fixture(scope="module")
def model():
    runtime = Runtime(compute_dtype="float32", remat=True)
    return stack_layers(models.random_model(CONFIG, runtime=runtime))


def new_state(model):
    params = {
        name: jnp.array(leaf, jnp.float32)
        for name, leaf in named_parameters(model).items()
    }
    return TrainState(params, OPTIMIZER.init(params), jnp.zeros((), jnp.int32))


def trained(model, mesh):
    """The state and the metrics of a step."""
    state = sharding.place(new_state(model), mesh)
    placed = sharding.place_batch(batch(), state.step)
    template = jax.eval_shape(lambda: model)
    with sharding.on(mesh):
        return make_train_step(template, OPTIMIZER)(state, {}, placed)


@pytest.fixture(scope="module")
def of_one_device(model):
    return trained(model, None)


MESHES = [
    MeshConfig("fsdp=2,tensor=2,sequence=2"),
    MeshConfig("data=2,tensor=2,sequence=2", mesh_type="explicit"),
    *(MeshConfig(axis) for axis in AXES),
    MeshConfig("data=2,fsdp=4"),
    MeshConfig("fsdp=4,sequence=2"),
]


@pytest.mark.parametrize("config", MESHES, ids=lambda c: f"{c.mesh}-{c.mesh_type}")
def test_a_step_is_that_of_one_device(config, model, of_one_device):
    state, metrics = trained(model, config.make())
    true_state, true_metrics = of_one_device
    assert_close(metrics["loss"], true_metrics["loss"], "loss")
    # The first moment is a tenth of the gradient.
    found, expected = (s.optimizer_state[0].mu for s in (state, true_state))
    for name, gradient in found.items():
        assert_close(gradient, expected[name], "gradient")
        assert state.params[name].sharding.is_equivalent_to(
            gradient.sharding, gradient.ndim
        )
    specs = sharding.state_specs(state, config.make())
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
        assert leaf.sharding.is_equivalent_to(
            NamedSharding(leaf.sharding.mesh, spec), leaf.ndim
        )


@pytest.mark.parametrize("kind", TYPES)
def test_an_evaluation_is_that_of_one_device(kind, model, of_one_device):
    mesh = MeshConfig("data=2,sequence=4", mesh_type=kind).make()
    state = sharding.place(new_state(model), mesh)
    with sharding.on(mesh):
        step = make_evaluation_step(jax.eval_shape(lambda: model))
        sums = step(state.params, sharding.place_batch(batch(), state.step))
    assert_close(mean_metrics(sums)["loss"], of_one_device[1]["loss"], "loss")


def test_a_state_is_restored_on_other_devices(tmp_path, model):
    """8 devices, then 2, then 1: the same values, laid out as each mesh wants them."""
    values = new_state(model)
    devices = jax.devices()
    counts = {8: "fsdp=4,tensor=2", 2: "fsdp=2", 1: ""}
    meshes = [MeshConfig(text).make(devices[:n]) for n, text in counts.items()]
    state = sharding.place(values._replace(step=jnp.int32(1)), meshes[0])
    for step, mesh in enumerate([*meshes[1:], None], 1):
        checkpoints = Checkpoints(tmp_path / str(step))
        checkpoints.save(state)
        checkpoints.finish()
        like = sharding.place(new_state(model), mesh)
        state = checkpoints.restore(like)
        checkpoints.close()
        for leaf, wanted in zip(
            jax.tree.leaves(state), jax.tree.leaves(like), strict=True
        ):
            assert leaf.sharding == wanted.sharding
    for name, value in state.params.items():
        np.testing.assert_array_equal(value, values.params[name])


def test_whole_parameters_for_a_file():
    mesh = MeshConfig("fsdp=4,tensor=2").make()
    values = {"blocks.0.mlp.up.kernel": jnp.arange(64.0).reshape(8, 8)}
    [placed] = sharding.place(values, mesh).values()
    assert placed.sharding.shard_shape(placed.shape) == (2, 4)
    [whole] = sharding.whole({"kernel": placed}).values()
    assert len(whole.devices()) == 1
    np.testing.assert_array_equal(whole, *values.values())


def test_rules():
    mesh = MeshConfig("data=1,fsdp=4,tensor=2").make()

    def spec(name, *shape):
        return sharding.spec_of(name, shape, mesh)

    assert spec("embedder.embedding", 40, 16) == P("tensor", "fsdp")
    assert spec("blocks.0.mixer.linear_x.kernel", 16, 24) == P("fsdp", "tensor")
    assert spec("groups.1.mlp.down.kernel", 3, 24, 16) == P(None, "tensor", "fsdp")
    gate = "groups.0.mixer.rg_lru.input_gate.kernel"
    assert spec(gate, 3, 4, 8, 8) == P(None, "tensor", "fsdp", None)
    assert spec("groups.0.mixer.rg_lru.a_param", 3, 8) == P(None, "tensor")
    assert spec("final_norm.scale", 16) == P()
    # A size that does not divide stays whole.
    assert spec("blocks.0.mixer.linear_x.kernel", 18, 24) == P(None, "tensor")
    adapted = "groups.0.mixer.linear_x.kernel"
    assert spec(f"{adapted}.base", 3, 16, 24) == P(None, "fsdp", "tensor")
    assert spec(f"{adapted}.lora_a", 3, 16, 4) == P(None, "fsdp", None)
    assert spec(f"{adapted}.lora_b", 3, 4, 24) == P(None, None, "tensor")
    assert spec(f"{adapted}.base.values", 3, 16, 24) == P(None, "fsdp", "tensor")
    assert spec(f"{adapted}.scales", 3, 1, 24) == P(None, None, "tensor")
    assert spec("blocks.2.mixer.mine.kernel", 2, 2, 2, 2) == P()


def test_every_parameter_of_a_model_has_a_place(model):
    """Matrices are cut along both axes; only norms and small biases are whole."""
    mesh = MeshConfig("fsdp=2,tensor=2").make(jax.devices()[:4])
    shapes = {name: leaf.shape for name, leaf in named_parameters(model).items()}
    for name, found in sharding.shardings_of(shapes, mesh).items():
        axes = {axis for axis in found.spec if axis}
        if name.endswith("kernel") and "conv" not in name:
            assert axes == {"fsdp", "tensor"}, name
        assert axes or name.endswith(("scale", "bias")), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh": "rows=2"}, "mesh: expected different axes of data, fsdp"),
        ({"mesh": "data=2,data=4"}, "got 'data=4'"),
        ({"mesh": "data=0"}, "got 'data=0'"),
        ({"mesh": "data,fsdp"}, "one axis at most without a number"),
        (
            {"mesh": "data=3"},
            "mesh: expected axes that multiply to 8 devices, got data",
        ),
        ({"mesh_type": "manual"}, "mesh_type: expected one of auto, explicit"),
        ({"processes": "two"}, "processes: expected one, auto or HOST:PORT"),
        ({"processes": "a:1,2,2"}, "an index below the count"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**fields).make()


def test_a_batch_must_divide():
    mesh = MeshConfig("data=4,sequence=2").make()
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 4"):
        sharding.check_batch(mesh, 6, 8)
    with pytest.raises(ValueError, match="sequence_length: expected a multiple of 2"):
        sharding.check_batch(mesh, 8, 7)


def test_one_axis_gets_the_remaining_devices():
    assert filled_axes("tensor=2,data", 8) == {"data": 4, "tensor": 2}
    assert dataclasses.replace(MeshConfig(), mesh="").make() is None
