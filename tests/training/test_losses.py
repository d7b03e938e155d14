"""The blocked loss and its gradients against plain logits, and golden numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import PRESETS, Runtime
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.checkpoints.parameters import describe
from recurrentgemma.training import losses
from recurrentgemma.training.data import Batch
from recurrentgemma.training.losses import cross_entropy, token_losses
from recurrentgemma.training.step import mean_loss
from tests.golden_models import (
    DEEPMIND_CASES,
    GOLDEN,
    load_data,
    load_golden,
    native_names,
)
from tests.models import random_model, random_tokens, tiny_config
from tests.tolerances import assert_close


def plain_cross_entropy(model, hidden, targets, mask):
    log_p = jax.nn.log_softmax(model.logits(hidden))
    chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * mask)


def case(batch_size, length, dtype="float32", **fields):
    model = random_model(tiny_config(**fields), runtime=Runtime(compute_dtype=dtype))
    keys = jax.random.split(jax.random.key(3), 2)
    shape = (batch_size, length)
    hidden = jax.random.normal(keys[0], (*shape, model.config.width), jnp.dtype(dtype))
    mask = jax.random.bernoulli(keys[1], 0.7, shape).astype(jnp.float32)
    return model, hidden, random_tokens(shape, seed=5), mask


@pytest.mark.parametrize("cap", [30.0, 2.0, None])
@pytest.mark.parametrize("block_tokens", [1, 6, 8, 1000])
def test_blocks_change_neither_value_nor_gradients(block_tokens, cap):
    model, hidden, targets, mask = case(2, 11, logits_soft_cap=cap)

    def blocked(model, hidden):
        return cross_entropy(model, hidden, targets, mask, block_tokens=block_tokens)

    def plain(model, hidden):
        return plain_cross_entropy(model, hidden, targets, mask)

    count = mask.sum()
    assert_close(blocked(model, hidden) / count, plain(model, hidden) / count, "loss")
    ours = jax.jit(jax.grad(lambda m, h: 3 * blocked(m, h), argnums=(0, 1)))
    theirs = jax.grad(lambda m, h: 3 * plain(m, h), argnums=(0, 1))
    (d_model, d_hidden), (d_model_plain, d_hidden_plain) = (
        f(model, hidden) for f in (ours, theirs)
    )
    assert_close(d_hidden, d_hidden_plain, "gradient")
    assert_close(
        d_model.embedder.embedding[...],
        d_model_plain.embedder.embedding[...],
        "gradient",
    )


def test_bfloat16_activations_give_a_float32_loss():
    model, hidden, targets, mask = case(2, 8, "bfloat16")
    loss = jax.jit(lambda h: cross_entropy(model, h, targets, mask))
    value, gradient = jax.value_and_grad(loss)(hidden)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    expected = plain_cross_entropy(model, hidden, targets, mask)
    assert_close(value, expected, "loss", "bfloat16")


def test_all_logits_never_exist_at_once():
    model, hidden, targets, mask = case(2, 64, vocab_size=977)
    step = jax.jit(
        jax.grad(lambda h: cross_entropy(model, h, targets, mask, block_tokens=8))
    )
    text = step.lower(hidden).as_text()
    assert "2x4x977x" in text
    assert "2x64x977x" not in text


def test_a_large_embedding_s_gradient_is_added_to_in_parts(monkeypatch):
    model, hidden, targets, mask = case(2, 11)
    gradients = []
    for limit in (losses.LARGE_EMBEDDING, 24 * 7):  # 40 pieces in parts of 7 rows
        monkeypatch.setattr(losses, "LARGE_EMBEDDING", limit)
        loss = jax.grad(lambda m: cross_entropy(m, hidden, targets, mask))
        gradients.append(jax.jit(loss)(model).embedder.embedding[...])
    assert_close(gradients[1], gradients[0], "gradient")


def test_temporaries_are_below_a_tenth_of_all_logits():
    length, vocab_size, width = 8192, 256_000, 2560
    config = dataclasses.replace(
        PRESETS["recurrentgemma-2b"], num_layers=1, block_pattern=("recurrent",)
    )
    assert (config.vocab_size, config.width) == (vocab_size, width)
    model = describe(config, Runtime(compute_dtype="float32"))
    hidden = jax.ShapeDtypeStruct((1, length, width), jnp.float32)

    def loss(model, hidden):
        return cross_entropy(model, hidden, targets, mask) / length

    targets, mask = jnp.zeros((1, length), jnp.int32), jnp.ones((1, length))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(model, hidden).compile()
    all_logits = length * vocab_size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_logits / 10


def test_the_z_loss_and_its_gradient():
    model, hidden, targets, mask = case(2, 11)

    def ours(hidden):
        found = token_losses(model, hidden, targets, mask, z_weight=0.1, block_tokens=8)
        return found.objective, found.nats

    def plain(hidden):
        normaliser = jax.nn.logsumexp(model.logits(hidden), axis=-1)
        nats = plain_cross_entropy(model, hidden, targets, mask)
        return nats + 0.1 * jnp.sum(mask * normaliser**2)

    (value, nats), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(hidden)
    expected, expected_gradient = jax.value_and_grad(plain)(hidden)
    assert_close(value / mask.sum(), expected / mask.sum(), "loss")
    assert_close(gradient, expected_gradient, "gradient")
    total = plain_cross_entropy(model, hidden, targets, mask)
    assert_close(jnp.sum(nats * mask) / mask.sum(), total / mask.sum(), "loss")


@pytest.mark.parametrize("name", ["griffin_mixed", "packed_documents"])
def test_loss_and_gradients_are_those_of_the_released_code(name):
    assert name in DEEPMIND_CASES
    model, data = (
        load_golden(GOLDEN / "deepmind" / name),
        load_data(GOLDEN / "deepmind" / name),
    )
    batch = Batch(
        tokens=data["tokens"][:, :-1],
        positions=data["segment_pos"][:, :-1],
        targets=data["tokens"][:, 1:],
        mask=data["loss_mask"],
    )
    value, gradients = jax.jit(jax.value_and_grad(mean_loss))(model, batch)
    assert_close(value, data["loss"], "loss")
    prefix = "grad/"
    expected = native_names(
        {k[len(prefix) :]: v for k, v in data.items() if k.startswith(prefix)}
    )
    ours = named_parameters(gradients)
    assert ours.keys() == expected.keys()
    for parameter, value in ours.items():
        assert_close(np.asarray(value), expected[parameter], "gradient")
