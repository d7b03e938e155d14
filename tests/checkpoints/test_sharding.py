"""A sharding that `load` accepts runs; any other is refused before anything is read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from recurrentgemma import Sampler, Sampling, Tokenizer
from recurrentgemma.checkpoints import load, loading, named_parameters, save
from recurrentgemma.training.losses import cross_entropy
from tests.checkpoints.checkpoints import config
from tests.checkpoints.test_round_trips import TOKENIZER
from tests.models import random_model, random_tokens
from tests.tolerances import assert_close

MAX_NEW_TOKENS = 3


def mesh(shape=(2, 4), names=("data", "model"), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def by_axis(axis):
    """Cuts the last axis of each parameter that can be cut."""

    def choose(name, shape):
        spec = [None] * len(shape)
        divisible = [i for i, size in enumerate(shape) if size % mesh_.shape[axis] == 0]
        if divisible:
            spec[divisible[-1]] = axis
        return NamedSharding(mesh_, PartitionSpec(*spec))

    mesh_ = mesh() if axis == "model" else mesh((8,), (axis,))
    return choose


ACCEPTED = {
    "device": lambda: SingleDeviceSharding(jax.devices()[5]),
    "tensor": lambda: by_axis("model"),
    "foreign": lambda: by_axis("of_a_user"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    pattern = ("recurrent", "local_attention")
    small = config(vocab_size=512, block_pattern=pattern, num_layers=2)
    save(path, random_model(small), Tokenizer(TOKENIZER))
    return path


@jax.jit
def logits_and_gradient(model, tokens):
    def loss(model):
        hidden, _ = model(tokens)
        total = cross_entropy(model, hidden, tokens, jnp.ones(tokens.shape))
        return total / tokens.size, model.logits(hidden)

    gradient, logits = jax.grad(loss, has_aux=True)(model)
    return logits, gradient


def results(path, sharding):
    model, _ = load(path, sharding=sharding)
    logits, gradient = logits_and_gradient(
        model, random_tokens((2, 16), vocab_size=512)
    )
    return logits, named_parameters(gradient)


def sample(path, sharding):
    model, tokenizer = load(path, sharding=sharding)
    [sample] = Sampler(model, tokenizer, compile_ahead=False)(
        ["a"], max_new_tokens=MAX_NEW_TOKENS, sampling=Sampling(temperature=0)
    )
    return sample.tokens


@functools.cache
def on_one_device(path):
    return results(path, None)


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_is_accepted_runs_like_one_device(kind, saved):
    logits, gradients = results(saved, ACCEPTED[kind]())
    expected_logits, expected_gradients = on_one_device(saved)
    assert_close(logits, expected_logits, "logits")
    for name, expected in expected_gradients.items():
        assert_close(gradients[name], expected, "gradient")


@pytest.mark.slow
def test_the_sampler_runs_like_on_one_device(saved):
    assert sample(saved, by_axis("model")) == sample(saved, None)


def on_two(first, second):
    """One sharding for the embedding, another for the rest."""
    return lambda name, shape: first if "embed" in name else second


def devices(*order):
    return np.array([jax.devices()[i] for i in order])


REFUSED = {
    "two devices": (
        lambda: on_two(*(SingleDeviceSharding(jax.devices()[i]) for i in (0, 1))),
        "devices of all parameters to be one mesh",
    ),
    "two meshes": (
        lambda: on_two(
            NamedSharding(mesh(), PartitionSpec()),
            NamedSharding(mesh((2,), ("data",)), PartitionSpec()),
        ),
        "devices of all parameters to be one mesh",
    ),
    "another order": (
        lambda: on_two(
            NamedSharding(Mesh(devices(0, 1), "x"), PartitionSpec()),
            NamedSharding(Mesh(devices(1, 0), "x"), PartitionSpec()),
        ),
        "devices of all parameters to be one mesh",
    ),
    "axis types": (
        lambda: on_two(
            NamedSharding(mesh(), PartitionSpec()),
            NamedSharding(mesh(kind=AxisType.Explicit), PartitionSpec()),
        ),
        "devices of all parameters to be one mesh",
    ),
    "manual": (
        lambda: NamedSharding(mesh(kind=AxisType.Manual), PartitionSpec()),
        "the mesh has Manual axes",
    ),
    "indivisible": (
        lambda: NamedSharding(Mesh(devices(0, 1, 2, 3, 4), "x"), PartitionSpec("x")),
        "partitioned 5 times",
    ),
    "too many axes": (
        lambda: NamedSharding(mesh(), PartitionSpec("data", None, "model")),
        "cannot be placed as",
    ),
    "no devices": (
        lambda: NamedSharding(mesh().abstract_mesh, PartitionSpec()),
        "cannot be placed as",
    ),
    "host memory": (
        lambda: NamedSharding(mesh(), PartitionSpec(), memory_kind="pinned_host"),
        "expected the memory",
    ),
    "device": (lambda: jax.devices()[0], "expected a jax.sharding.Sharding"),
    "spec": (
        lambda: lambda name, shape: PartitionSpec(),
        "expected a NamedSharding or a SingleDeviceSharding for blocks.0",
    ),
    "no entry": (dict, "sharding: expected an entry for"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_run_is_refused_before_reading(kind, saved, monkeypatch):
    make, message = REFUSED[kind]
    monkeypatch.setattr(loading, "place", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=message):
        load(saved, sharding=make())
