"""Values by name: right, alike in every way of running, and free where unused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma import Runtime, Sampler, Sampling, save
from recurrentgemma.cache import make_rewindable
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.generation.model_digest import model_digest
from recurrentgemma.griffin import stack_layers
from recurrentgemma.inspect import (
    at,
    capture,
    edit,
    entropy,
    generating,
    keep_heads,
    names,
    with_observer,
)
from tests.models import WINDOW, forward, random_model, random_tokens, tiny_config
from tests.tolerances import assert_close

BATCH, LENGTH = 2, 9
CONFIG = tiny_config(
    block_pattern=("recurrent", "local_attention", "min_gru"), num_layers=3
)
POSITIONS = np.array([[0, 1, -1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, -1, -1]])
"""Padding inside and at the end of rows; two documents."""
REAL = POSITIONS >= 0
DOCUMENT = np.cumsum(POSITIONS == 0, axis=1)
RECURRENT, ATTENTION, GRU = (f"blocks.{i}.mixer" for i in range(3))


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens((BATCH, LENGTH))


@pytest.fixture(scope="module")
def captured(model, tokens):
    return capture(model, "*")(tokens, POSITIONS)


@pytest.fixture(scope="module")
def values(captured):
    return {name: np.asarray(x, np.float64) for name, x in captured[2].items()}


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _real(x):
    """Zero at padding, where values mean nothing."""
    return np.where(np.expand_dims(REAL, tuple(range(2, np.ndim(x)))), x, 0)


def _states(a, x, change=lambda h, t: h):
    """h = a h + x, one token after another, in the documents of `POSITIONS`."""
    h, states = np.zeros_like(x[:, 0]), []
    for t in range(LENGTH):
        start = (POSITIONS[:, t] == 0)[:, None]
        after = change(np.where(start, 0, a[:, t]) * h + x[:, t], t)
        h = np.where(REAL[:, t][:, None], after, h)
        states.append(h)
    return np.stack(states, 1)


def _recurrence(model, values):
    """Gates, decay, factor of the input and input of the RG-LRU, in float64."""
    unit = model.blocks[0].mixer.rg_lru
    u = values[f"{RECURRENT}.conv"]

    def gate(parameters):
        kernel, bias = (np.asarray(x, np.float64) for x in parameters.gate)
        blocks = u.reshape(BATCH, LENGTH, len(kernel), -1)
        logits = np.einsum("btgi,gio->btgo", blocks, kernel) + bias
        return _sigmoid(logits).reshape(u.shape)

    r, i = gate(unit.recurrence_gate), gate(unit.input_gate)
    a = np.exp(-8 * np.log1p(np.exp(np.asarray(unit.a_param[...], np.float64))) * r)
    starts = (POSITIONS == 0)[..., None]
    return r, i, a, np.where(starts, 1, np.sqrt(1 - a**2)) * i, u


def test_values_of_an_rg_lru_equal_a_computation_by_hand(model, values):
    """Float64, step by step, from the convolution's output."""
    r, i, a, factor, u = _recurrence(model, values)
    state = _states(a, factor * u)
    expected = {"recurrence_gate": r, "input_gate": i, "decay": a}
    expected |= {"state": state, "recurrence": state}
    for name, value in expected.items():
        assert_close(_real(values[f"{RECURRENT}.{name}"]), _real(value), "layer")
    stream = values["embedding"] + values[RECURRENT] + values["blocks.0.mlp"]
    assert_close(values["blocks.0.residual"], stream, "layer")


def test_values_of_a_min_gru_equal_a_computation_by_hand(model, values):
    block = model.blocks[2]
    x = values["blocks.1.residual"]
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    x = x * (1 + np.asarray(block.temporal_pre_norm.scale[...], np.float64))

    def linear(layer):
        kernel, bias = (
            np.asarray(p[...], np.float64) for p in (layer.kernel, layer.bias)
        )
        return x @ kernel + bias

    z = _sigmoid(linear(block.mixer.linear_z))
    state = _states(1 - z, z * linear(block.mixer.linear_h))
    for name, value in {"update_gate": z, "decay": 1 - z, "state": state}.items():
        assert_close(_real(values[f"{GRU}.{name}"]), _real(value), "layer")


def test_effective_attention_equals_products_of_decays(model, values):
    _, _, a, factor, u = _recurrence(model, values)
    expected = np.zeros((BATCH, LENGTH, CONFIG.lru_width, LENGTH))
    for b in range(BATCH):
        for s in range(LENGTH):
            weight = factor[b, s]
            for t in range(s, LENGTH):
                if not (REAL[b, s] and REAL[b, t]):
                    continue
                if DOCUMENT[b, t] != DOCUMENT[b, s]:
                    break
                weight = weight if t == s else weight * a[b, t]
                expected[b, t, :, s] = weight
    actual = values[f"{RECURRENT}.effective_attention"]
    assert_close(_real(actual), expected, "layer")
    applied = np.einsum("btes,bse->bte", actual, u)
    assert_close(_real(applied), _real(values[f"{RECURRENT}.state"]), "layer")


def test_attention_probabilities_equal_a_softmax_by_hand(values):
    head_dim, half = CONFIG.head_dim, round(CONFIG.rope_fraction * CONFIG.head_dim) // 2
    angle = POSITIONS[..., None] * 10_000.0 ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)[:, :, None]

    def rotated(x):
        pair = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
        return np.concatenate([pair.real, pair.imag, x[..., 2 * half :]], -1)

    q = rotated(values[f"{ATTENTION}.queries"])
    k, v = rotated(values[f"{ATTENTION}.keys"]), values[f"{ATTENTION}.values"]
    scores = np.einsum("btnh,bsh->btns", q, k[:, :, 0]) * head_dim**-0.5
    distance = POSITIONS[:, :, None] - POSITIONS[:, None]
    visible = (DOCUMENT[:, :, None] == DOCUMENT[:, None]) & REAL[:, None]
    visible &= (distance >= 0) & (distance <= WINDOW)
    weights = np.exp(scores) * visible[:, :, None]
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    actual = values[f"{ATTENTION}.probabilities"]
    assert_close(_real(actual), _real(weights), "layer")
    heads = np.einsum("btns,bsh->btnh", weights, v[:, :, 0])
    assert_close(_real(values[f"{ATTENTION}.heads"]), _real(heads), "layer")
    logs = np.log(np.where(weights > 0, weights, 1))
    assert_close(_real(entropy(actual)), _real(-(weights * logs).sum(-1)), "layer")


def test_names_are_those_of_a_call_in_order(model, captured):
    assert names(model) == tuple(captured[2])


def test_capturing_changes_nothing(model, tokens, captured):
    hidden, cache, _ = captured
    expected, expected_cache = model(tokens, POSITIONS)
    assert_close(hidden, expected, "layer")
    for ours, theirs in zip(
        jax.tree.leaves(cache), jax.tree.leaves(expected_cache), strict=True
    ):
        assert_close(ours, theirs, "cache")


def test_steps_show_what_the_whole_shows(model, tokens, captured):
    """Token by token, where the decode step op would run unobserved."""
    cache, look = model.init_cache(BATCH), capture(model, "*")
    whole = {name: np.asarray(value) for name, value in captured[2].items()}
    for t in range(LENGTH):
        ring = np.asarray(cache.layers[1].positions)
        real = REAL[:, t]
        _, cache, values = look(tokens[:, t : t + 1], POSITIONS[:, t : t + 1], cache)
        assert set(values) == set(whole)
        for name, value in values.items():
            value, expected = np.asarray(value)[:, 0], whole[name][:, t]
            if name.endswith("effective_attention"):
                expected = expected[..., t : t + 1]
            if name.endswith("probabilities"):
                expected = _in_slots(expected, ring, t)
            assert_close(value[real], expected[real], "layer")


def _in_slots(weights, ring, t):
    """[B, N, T] for the tokens of the whole -> [B, N, slots + 1] for ring and token."""
    found = np.zeros((*weights.shape[:2], ring.shape[1] + 1))
    found[..., -1] = weights[..., t]
    for b in range(BATCH):
        for s in range(t):
            if REAL[b, s] and DOCUMENT[b, s] == DOCUMENT[b, t]:
                found[b][:, :-1] += weights[b, :, s : s + 1] * (
                    ring[b] == POSITIONS[b, s]
                )
    return found


def test_rematerialised_and_stacked_layers_show_the_same(tokens, captured):
    runtime = Runtime(compute_dtype="float32", remat=True)
    stacked = stack_layers(random_model(CONFIG, runtime=runtime))
    _, _, values = capture(stacked, "blocks.?.mixer.state")(tokens, POSITIONS)
    assert list(values) == ["blocks.0.mixer.state", "blocks.2.mixer.state"]
    for name, value in values.items():
        assert_close(value, captured[2][name], "layer")


def test_a_pattern_that_matches_nothing(model, tokens):
    listed = ".*'blocks.9'.*blocks.0.mixer.decay, .*"
    with pytest.raises(ValueError, match="^patterns: " + listed):
        capture(model, ["embedding", "blocks.9"])(tokens)
    with pytest.raises(ValueError, match="^edits: " + listed):
        edit(model, {"embedding": jnp.negative, "blocks.9": jnp.negative})
    # It can be seen, not replaced.
    with pytest.raises(ValueError, match="^prompt: .* that can be replaced, got '.*'"):
        edit(model, prompt={"*.effective_attention": jnp.negative})


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({}, "edits: expected functions by name of a value, got None"),
        ({"edits": {}}, "edits: expected functions by name of a value, got {}"),
        ({"edits": {"embedding": 0.0}}, r"edits\['embedding'\]: expected a function, "),
        (
            {"generated": {3: jnp.negative}},
            "generated: expected a text that is not empty, got 3",
        ),
        ({"edits": [jnp.negative]}, "edits: expected functions by name of a value, "),
    ],
)
def test_edits_that_are_none(model, given, sentence):
    with pytest.raises(ValueError, match="^" + sentence):
        edit(model, **given)


def test_an_edit_of_another_shape(model, tokens):
    with pytest.raises(ValueError, match="^edits: .*the shape they are given, got "):
        edit(model, {RECURRENT: lambda value: value[:, :1]})(tokens)


EDITS = {
    f"{RECURRENT}.gate": lambda value: 0.5 * value,
    f"{RECURRENT}.input_gate": lambda value: value.at[..., ::2].set(0.0),
    f"{ATTENTION}.keys": lambda value: 2 * value,
    f"{ATTENTION}.probabilities": lambda value: value.at[:, :, 0].set(0.0),
    f"{ATTENTION}.heads": lambda value: value.at[:, :, 1].set(0.0),
    GRU: jnp.zeros_like,
    "blocks.?.mlp": jnp.negative,
}


@pytest.fixture(scope="module")
def edited(model):
    return edit(model, EDITS)


@pytest.fixture(scope="module")
def by_hand():
    """A model whose parameters do what `EDITS` do."""
    model = random_model(CONFIG)
    recurrent, attention, gru = (block.mixer for block in model.blocks)
    recurrent.linear_out.kernel[...] *= 0.5
    gate = recurrent.rg_lru.input_gate
    closed = jnp.arange(CONFIG.lru_width).reshape(gate.bias.shape) % 2 == 0
    gate.kernel[...] = jnp.where(closed[:, None], 0.0, gate.kernel[...])
    gate.bias[...] = jnp.where(closed, -1e9, gate.bias[...])
    attention.proj_k.kernel[...] *= 2
    out = attention.proj_out.kernel
    out[...] = out[...].at[: 2 * CONFIG.head_dim].set(0.0)
    for parameter in (gru.linear_out.kernel, gru.linear_out.bias):
        parameter[...] *= 0
    for block in model.blocks:
        block.mlp.down.kernel[...] *= -1
        if block.mlp.down.bias is not None:
            block.mlp.down.bias[...] *= -1
    return model


@pytest.fixture(scope="module")
def expected(by_hand, tokens, model):
    logits, _ = forward(by_hand, tokens, POSITIONS)
    unedited, _ = forward(model, tokens, POSITIONS)
    assert np.abs(_real(logits - unedited)).max() > 1
    return _real(logits)


def test_edits_in_prefill(edited, tokens, expected):
    assert_close(_real(forward(edited, tokens, POSITIONS)[0]), expected, "logits")


@pytest.mark.parametrize("size", [3, 1], ids=["chunks", "decode steps"])
def test_edits_in_chunks_and_steps(edited, tokens, expected, size):
    cache = edited.init_cache(BATCH)
    for t in range(0, LENGTH, size):
        chunk = slice(t, t + size)
        logits, cache = forward(edited, tokens[:, chunk], POSITIONS[:, chunk], cache)
        real = REAL[:, chunk, None]
        assert_close(np.where(real, logits, 0), expected[:, chunk], "logits")


def _sampler(model, **options):
    return Sampler(model, compile_ahead=False, **options)


def _write(sampler, prompt=(2, 5, 7, 11, 3), **options):
    [sample] = sampler(
        [list(prompt)],
        max_new_tokens=8,
        sampling=Sampling(temperature=0),
        end_tokens=[],
        **options,
    )
    return sample.tokens


@pytest.fixture(scope="module")
def written(by_hand, model):
    tokens = _write(_sampler(by_hand))
    assert tokens != _write(_sampler(model))
    return tokens


def test_edits_in_generation(edited, written):
    assert _write(_sampler(edited)) == written


def test_edits_in_speculation(edited, written):
    """A draft with the same edits guesses all: 8 tokens take two calls of four."""
    sampler = _sampler(edited, draft=edited, num_draft_tokens=3)
    assert _write(sampler) == written
    [sample] = sampler(
        [[2, 5, 7, 11, 3]], max_new_tokens=8, sampling=Sampling(0), end_tokens=[]
    )
    assert sample.num_calls == 2


def test_edits_in_scoring(edited, by_hand, tokens):
    positions = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
    log_probs = jax.nn.log_softmax(forward(by_hand, tokens, positions)[0])
    for row, expected in zip(tokens, log_probs, strict=True):
        score = _sampler(edited).score(row.tolist())
        assert_close(score.log_probs, expected[jnp.arange(8), row[1:]], "logits")


@jax.jit
@jax.grad
def _gradient(model, tokens):
    hidden, _ = model(tokens, POSITIONS)
    log_probs = jax.nn.log_softmax(model.logits(hidden))
    return -jnp.where(REAL, log_probs[..., 3], 0.0).sum()


def test_edits_in_gradients(edited, by_hand, tokens):
    """Alike for every parameter that was not changed by hand."""
    changed = ("0.mixer.linear_out", "input_gate", "proj_k", "proj_out", "mlp.down")
    theirs = named_parameters(_gradient(by_hand, tokens))
    ours = named_parameters(_gradient(edited, tokens))
    same = [name for name in theirs if not any(part in name for part in changed)]
    assert len(same) > 20
    for name in same:
        if name.startswith("blocks.2.mixer"):
            assert not np.any(
                ours[name]
            )  # It was changed by hand, and hidden by edits.
        else:
            assert_close(ours[name], theirs[name], "gradient")


def test_a_replaced_state_is_what_the_next_token_starts_from(model, tokens, values):
    _, _, a, factor, u = _recurrence(model, values)
    patched = edit(model, {f"{RECURRENT}.state": at(lambda p: p == 2, jnp.negative)})
    expected = _states(
        a, factor * u, lambda h, t: np.where(POSITIONS[:, t, None] == 2, -h, h)
    )
    _, cache, seen = capture(patched, f"{RECURRENT}.state")(tokens, POSITIONS)
    [state] = seen.values()
    assert_close(_real(state), _real(expected), "layer")
    assert_close(cache.layers[0].h, expected[:, -1], "cache")


def test_replaced_states_in_chunks_of_rewindable_caches(tokens):
    pattern = ("recurrent", "min_gru")
    config = tiny_config(complex_rg_lru=True, block_pattern=pattern, num_layers=2)
    halved = edit(random_model(config), {"*.state": lambda h: 0.5 * h})
    whole, _ = forward(halved, tokens, POSITIONS)
    cache = make_rewindable(halved.init_cache(BATCH), config, 3)
    parts = []
    for t in range(0, LENGTH, 3):
        part = slice(t, t + 3)
        logits, cache = forward(halved, tokens[:, part], POSITIONS[:, part], cache)
        parts.append(logits)
    assert_close(_real(np.concatenate(parts, axis=1)), _real(whole), "logits")


def test_each_token_keeps_the_heads_of_lowest_entropy(values):
    given = jnp.asarray(values[f"{ATTENTION}.probabilities"])
    for sign, highest in ((1, False), (-1, True)):
        rank = (sign * entropy(given)).argsort(-1).argsort(-1)
        for count in range(CONFIG.num_heads + 1):
            kept = keep_heads(count, highest=highest)(given)
            expected = np.where((rank < count)[..., None], given, 0)
            np.testing.assert_array_equal(kept, expected)


def test_edits_of_an_edited_model_are_applied_in_turn(model):
    once = edit(model, {GRU: lambda x: x + 1, "*.mlp": jnp.negative})
    twice = edit(once, {"blocks.2.*": lambda x: 2 * x}, generated={GRU: jnp.negative})
    one, position = jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int32)
    for observer, expected in (
        (twice.observer, {GRU: 4, "blocks.2.mlp": -2, "blocks.0.mlp": -1}),
        (generating(twice).observer, {GRU: -4, "blocks.2.mlp": -2}),
        (once.observer, {GRU: 2, "blocks.2.mlp": -1}),
    ):
        for name, value in expected.items():
            assert observer.sees(name) and observer.replaces(name)
            assert observer.replace(name, one, position) == value
        assert not observer.sees("embedding")


@pytest.mark.parametrize("phase", ["prompt", "generated"])
def test_other_edits_for_the_prompt_and_for_what_is_generated(model, by_hand, phase):
    """One model reads, another one writes."""
    reader, writer = (by_hand, model) if phase == "prompt" else (model, by_hand)
    prefix = _sampler(reader).prefill([2, 5, 7, 11, 3])
    prefix = dataclasses.replace(prefix, model_digest=model_digest(writer))
    expected = _write(_sampler(writer), prompt=[], prefix=prefix)
    phased = edit(model, **{phase: EDITS})
    assert _write(_sampler(phased)) == expected
    assert expected not in (_write(_sampler(reader)), _write(_sampler(writer)))


def _program(model, tokens):
    return jax.jit(lambda model, tokens: model(tokens)).lower(model, tokens).as_text()


def test_a_model_without_edits_costs_nothing_and_is_not_changed(model, tokens):
    before = _program(model, tokens)
    changed = edit(model, {"embedding": lambda value: 2 * value})
    assert model.observer is None
    assert _program(model, tokens) == before
    assert _program(changed, tokens) != before
    assert _program(with_observer(changed, None), tokens) == before
    # A phase without edits.
    assert _program(edit(model, generated=EDITS), tokens) == before
    assert generating(edit(model, prompt=EDITS)).observer is None
    assert generating(changed) is changed


def test_equal_edits_are_one_program(model):
    traced = []

    @jax.jit
    def run(model, tokens):
        traced.append(None)
        return model(tokens)[0]

    for _ in range(2):
        run(edit(model, EDITS), jnp.zeros((1, 3), jnp.int32))
    assert len(traced) == 1


def test_a_prefix_of_an_edited_model_is_for_that_model_alone(
    model, edited, tmp_path, written
):
    prompt, last = [2, 5, 7, 11], [3]
    sampler = _sampler(edited)
    prefix = sampler.prefill(prompt)
    assert _write(sampler, prompt=last, prefix=prefix) == written
    for other in (model, edit(model, EDITS)):
        with pytest.raises(ValueError, match="a model of other edits"):
            _sampler(other).prefill(last, prefix=prefix)
    with pytest.raises(ValueError, match="a model of other edits"):
        sampler.prefill(last, prefix=_sampler(model).prefill(prompt))
    with pytest.raises(ValueError, match="^prefix: expected one of a model without"):
        prefix.save(tmp_path / "edited.prefix")
    with pytest.raises(ValueError, match="^model: expected one without edits, got "):
        save(tmp_path / "edited", edited, None)
    assert not any(tmp_path.iterdir())
