"""Model, gradient and sampler on 8 devices give the numbers of one device.

On Explicit and Auto meshes, whatever the axes are called, and inside a `shard_map` of
the caller that checks varying axes.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from recurrentgemma import Sampler, Sampling, load
from recurrentgemma.kernels import linear_scan, local_attention, rg_lru
from tests import models
from tests.tolerances import assert_close

MESHES = {
    "explicit": (("data", "tensor"), AxisType.Explicit),
    "auto": (("data", "tensor"), AxisType.Auto),
    "foreign": (("rows", "columns"), AxisType.Auto),
    "sequence": (("sequence", "tensor"), AxisType.Auto),
    "explicit sequence": (("sequence", "data"), AxisType.Explicit),
}
BATCH, LENGTH = 4, 40
FIRST = 24
"""Tokens of the first of two chunks, as many of each shard as the convolution needs."""


def make_mesh(name):
    axes, kind = MESHES[name]
    return jax.make_mesh((4, 2), axes, axis_types=(kind,) * 2)


def loss_and_results(model, tokens, positions):
    """The sum of squares of logits, read in two chunks; logits and cache too."""

    def loss(model):
        parts, cache = [], None
        for part in (slice(None, FIRST), slice(FIRST, None)):
            hidden, cache = model(tokens[:, part], positions[:, part], cache)
            logits = model.logits(hidden)
            parts.append(jnp.where(positions[:, part, None] < 0, 0, logits))
        return sum(jnp.mean(part**2) for part in parts), (parts, cache)

    return jax.value_and_grad(loss, has_aux=True, allow_int=True)(model)


@pytest.fixture(scope="module")
def model():
    return models.random_model(models.tiny_config())


@pytest.fixture(scope="module")
def inputs():
    tokens = np.asarray(models.random_tokens((BATCH, LENGTH)))
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    positions[1, 5:] = np.arange(LENGTH - 5)
    # Documents over the borders of shards, padding inside a row, and a short row.
    positions[2] = np.r_[
        np.arange(11), np.full(3, -1), np.arange(11, 14), np.arange(16), np.full(7, -1)
    ]
    positions[3, 9:] = -1
    return tokens, positions


@pytest.fixture(scope="module")
def expected(model, inputs):
    return jax.jit(loss_and_results)(model, *map(jnp.asarray, inputs))


def shard_model(model, mesh):
    """Matrices cut along their last axis where it divides, as tensor parallelism does."""

    def spec(leaf):
        divides = leaf.ndim > 1 and leaf.shape[-1] % 2 == 0
        return P(*[None] * (leaf.ndim - 1), mesh.axis_names[1]) if divides else P()

    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), model
    )


def assert_same(actual, expected):
    ((loss, (logits, cache)), gradients) = actual
    ((true_loss, (true_logits, true_cache)), true_gradients) = expected
    assert_close(loss, true_loss, "loss")
    for found, wanted in zip(logits, true_logits, strict=True):
        assert_close(found, wanted, "logits")
    for kind, found, wanted in (
        ("cache", cache, true_cache),
        ("gradient", gradients, true_gradients),
    ):
        leaves = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
        for leaf, true_leaf in leaves:
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert_close(leaf, true_leaf, kind)


@pytest.mark.parametrize("name", MESHES)
def test_model_and_gradient(name, model, inputs, expected):
    mesh = make_mesh(name)
    with jax.set_mesh(mesh):
        axis = mesh.axis_names[0]
        rows = P(mesh.axis_names[1], axis) if axis == "sequence" else P(axis)
        sharding = NamedSharding(mesh, rows)
        placed = (jax.device_put(array, sharding) for array in inputs)
        actual = jax.jit(loss_and_results)(shard_model(model, mesh), *placed)
    assert_same(actual, expected)
    [(_, (logits, cache)), _] = actual
    if MESHES[name][1] == AxisType.Explicit:
        for array in (*logits, *jax.tree.leaves(cache)):
            assert array.sharding.spec[0] == rows[0]


def test_model_in_a_shard_map_of_the_caller(model, inputs, expected):
    """With varying axes checked: rows on their devices, parameters whole."""
    mesh = make_mesh("auto")

    def part(model, tokens, positions):
        (_, (logits, cache)), gradients = loss_and_results(model, tokens, positions)
        return logits, cache, gradients

    with jax.set_mesh(mesh):
        logits, _, gradients = jax.jit(
            jax.shard_map(
                part,
                in_specs=(P(), P("data"), P("data")),
                out_specs=(P("data"), P("data"), P()),
            )
        )(model, *inputs)
    [(_, (true_logits, _)), true_gradients] = expected
    for found, wanted in zip(logits, true_logits, strict=True):
        assert_close(found, wanted, "logits")
    # The loss of a device is the mean over its rows; `shard_map` adds the gradients.
    leaves = zip(
        jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True
    )
    for leaf, true_leaf in leaves:
        assert_close(leaf, mesh.shape["data"] * np.asarray(true_leaf), "gradient")


@pytest.fixture(scope="module")
def sample():
    """Makes texts with a tiny model of random parameters."""
    tokenizer = load("nano")[1]
    config = models.tiny_config(vocab_size=tokenizer.vocab_size)

    def run():
        model = models.random_model(config)
        sampler = Sampler(model, tokenizer, compile_ahead=False)
        samples = sampler(["def f(", "import"], max_new_tokens=5, sampling=Sampling())
        return [sample.text for sample in samples]

    return run


@pytest.fixture(scope="module")
def texts_of_one_device(sample):
    return sample()


@pytest.mark.parametrize(
    ("sizes", "axes", "kind"),
    [
        ((8,), ("data",), AxisType.Explicit),
        ((8,), ("data",), AxisType.Auto),
        ((2, 2, 2), ("data", "tensor", "sequence"), AxisType.Auto),
    ],
    ids=["explicit", "auto", "sequence"],
)
def test_sampler(sizes, axes, kind, sample, texts_of_one_device):
    kinds = (kind,) * len(axes)
    with jax.set_mesh(jax.make_mesh(sizes, axes, axis_types=kinds)):
        assert sample() == texts_of_one_device


def op_calls():
    """Ops of one sharded sequence each, by name."""

    def attend(x):
        q = x.reshape(*x.shape[:2], 4, 8)
        positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), x.shape[:2])
        out, _ = local_attention(
            *(q, q, q),
            positions=positions,
            cache=None,
            window=16,
            scale=1.0,
            soft_cap=None,
        )
        return out

    def recur(x):
        positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), x.shape[:2])
        return rg_lru(x, x, -x, jnp.ones(x.shape[2]), positions)[0]

    return {
        "linear_scan": lambda x: linear_scan(x, jnp.tanh(x))[0],
        "rg_lru": recur,
        "local_attention": attend,
    }


@pytest.mark.parametrize("op", op_calls())
def test_nothing_gathers_sequences_under_other_names(op):
    """Forward and backward, the compiler partitions the plain form by rows."""
    mesh = make_mesh("foreign")
    sharding = NamedSharding(mesh, P("rows"))
    x = jax.ShapeDtypeStruct((8, 64, 32), jnp.float32, sharding=sharding)
    call = op_calls()[op]
    with jax.set_mesh(mesh):
        run = jax.jit(jax.grad(lambda x: jnp.sum(call(x) ** 2)))
        text = run.lower(x).compile().as_text()
    gathered = re.findall(r"= (\S+) all-gather", text)
    assert not [shape for shape in gathered if ",64," in shape], gathered
    assert "f32[2,64,32]" in text
