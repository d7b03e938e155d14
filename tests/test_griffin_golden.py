"""Whole models against numbers computed with recurrentgemma 1.0.1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import Runtime
from recurrentgemma.kernels.local_attention import KVCache
from tests.golden_models import (
    DEEPMIND_CASES,
    GOLDEN,
    load_data,
    load_golden,
    named_leaves,
    native_names,
)
from tests.models import forward
from tests.tolerances import assert_close

BFLOAT16_MEAN_ERROR = 0.06
"""The original's own bfloat16 is up to 0.041 from its float32 on average."""


@functools.cache
def _case(name):
    folder = GOLDEN / "deepmind" / name
    return load_golden(folder), load_data(folder)


def _truth(data, name):
    """Each row by itself where the original lets padding leak."""
    return data.get(f"{name}_rows_alone", data[name])


def _decode(model, data, cache):
    logits = []
    for tokens, positions in zip(
        data["decode_tokens"].T, data["decode_segment_pos"].T, strict=True
    ):
        step, cache = forward(model, tokens[:, None], positions[:, None], cache)
        logits.append(step[:, 0])
    return jnp.stack(logits, axis=1), cache


def _check_cache(model, cache, data, prefix, *, compare_conv=True):
    for i, kind in enumerate(model.config.block_types):
        state, place = cache.layers[i], f"{prefix}/blocks.{i}"
        if kind == "recurrent":
            assert_close(state.h, data[f"{place}/rg_lru_state"], "cache")
            if compare_conv:
                assert_close(state.conv, data[f"{place}/conv1d_state"], "cache")
            continue
        np.testing.assert_array_equal(cache.next_position, data[f"{place}/num_tokens"])
        held = np.asarray(state.positions) >= 0
        for name in ("keys", "values"):
            ours = np.where(held[..., None, None], getattr(state, name), 0)
            theirs = np.where(held[..., None, None], data[f"{place}/{name}"], 0)
            assert_close(ours, theirs, "cache")


def _check_key_positions(cache, positions, window):
    """The ring holds the last W tokens of each row's last document, and no others."""
    rings = [state for state in cache.layers if isinstance(state, KVCache)]
    if not rings:
        return
    for ring in rings[1:]:
        np.testing.assert_array_equal(ring.positions, rings[0].positions)
    for row, held in zip(positions, np.asarray(rings[0].positions), strict=True):
        row = row[row >= 0]
        start = np.flatnonzero(row == 0)[-1] if (row == 0).any() else 0
        expected = np.full(window, -1)
        for position in row[start:][-window:]:
            expected[position % window] = position
        np.testing.assert_array_equal(held, expected)


@pytest.mark.parametrize("name", DEEPMIND_CASES)
def test_forward_and_cache(name):
    model, data = _case(name)
    logits, cache = forward(model, data["tokens"], data["segment_pos"])
    real = (data["segment_pos"] >= 0)[..., None]
    assert np.isfinite(logits).all()
    assert_close(
        np.where(real, logits, 0), np.where(real, _truth(data, "logits"), 0), "logits"
    )
    # The original leaves padding in the convolution state of short rows.
    compare_conv = name != "ragged_short_prompts"
    _check_cache(model, cache, data, "cache_after_prefill", compare_conv=compare_conv)
    _check_key_positions(cache, data["segment_pos"], model.config.attention_window)


@pytest.mark.parametrize("name", DEEPMIND_CASES)
def test_decode_far_beyond_the_window(name):
    model, data = _case(name)
    _, cache = forward(model, data["tokens"], data["segment_pos"])
    logits, cache = _decode(model, data, cache)
    assert_close(logits, _truth(data, "decode_logits"), "logits")
    if name != "ragged_short_prompts":
        _check_cache(model, cache, data, "cache_after_decode")


@pytest.mark.parametrize("length", [1, 3, 8, 9, 16, 17])
def test_cache_after_shorter_prefill(length):
    model, data = _case("griffin_mixed")
    tokens, positions = data["tokens"], data["segment_pos"]
    # The rest is padding, so that one compilation serves every length.
    positions = np.where(np.arange(tokens.shape[1]) < length, positions, -1)
    _, cache = forward(model, tokens, positions)
    _check_cache(model, cache, data, f"cache_after_prefill_of_{length}")


@pytest.mark.parametrize("name", DEEPMIND_CASES)
def test_loss_and_every_gradient(name):
    model, data = _case(name)
    tokens, mask = data["tokens"], data["loss_mask"]

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(model):
        hidden, _ = model(tokens, data["segment_pos"])
        log_probs = jax.nn.log_softmax(model.logits(hidden[:, :-1]))
        targets = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)
        return -jnp.sum(mask * targets[..., 0]) / jnp.sum(mask)

    loss, gradient = loss_and_gradient(model)
    assert_close(loss, data["loss"], "loss")
    expected = native_names(
        {
            key.removeprefix("grad/"): value
            for key, value in data.items()
            if key.startswith("grad/")
        }
    )
    actual = named_leaves(gradient)
    assert set(actual) == set(expected)
    for key, value in expected.items():
        try:
            assert_close(actual[key], value, "gradient")
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from None


BFLOAT16_CASES = [
    name
    for name in DEEPMIND_CASES
    if "logits_bf16" in np.load(GOLDEN / "deepmind" / name / "data.npz").files
]


@pytest.mark.parametrize("name", BFLOAT16_CASES)
def test_bfloat16(name):
    runtime = Runtime(compute_dtype="bfloat16")
    model = load_golden(GOLDEN / "deepmind" / name, runtime)
    data = load_data(GOLDEN / "deepmind" / name)
    logits, cache = forward(model, data["tokens"], data["segment_pos"])
    decoded, _ = _decode(model, data, cache)
    for actual, key in ((logits, "logits"), (decoded, "decode_logits")):
        expected = _truth(data, key)
        real = np.broadcast_to(True, expected.shape)
        if key == "logits":
            real = np.broadcast_to(data["segment_pos"][..., None] >= 0, expected.shape)
        assert_close(np.asarray(actual)[real], expected[real], "logits", "bfloat16")
        assert np.abs(actual - expected)[real].mean() < BFLOAT16_MEAN_ERROR
