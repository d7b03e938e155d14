"""With a draft the text is what it is without one, only in fewer calls of the model.

As the tokens are equal for every seed, so is their distribution.
"""

import dataclasses

import jax
import numpy as np
import pytest

from recurrentgemma.generation import chunk_reader
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from tests.generation.test_sampler import GOLDEN, Tokenizer
from tests.golden_models import load_golden
from tests.models import TINY_PRESETS, random_model, tiny_config

VOCAB = 40
SETTINGS = {
    "greedy": Sampling(0),
    "sampled": Sampling(0.8),
    "all": Sampling(1.1, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.3),
}


def _disturbed(model, amount):
    """A model that agrees with another one often, but not always."""
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noise = [
        leaf * (1 + amount * jax.random.normal(key, leaf.shape))
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


def _agree(sampler, plain, prompts, **request):
    together = sampler(prompts, end_tokens=[3], **request)
    expected = plain(prompts, end_tokens=[3], **request)
    for a, b in zip(together, expected, strict=True):
        assert a.tokens == b.tokens and a.ended == b.ended
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)
        assert b.num_calls == len(b.tokens)
    return sum(s.num_calls for s in together) / sum(len(s.tokens) for s in together)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "pattern",
    [("recurrent", "local_attention"), ("global_attention", "recurrent")],
    ids="-".join,
)
def test_the_text_is_that_of_plain_decoding(pattern, settings):
    """Ragged rows through fewer slots, far beyond the window; drafts of all kinds."""
    config = tiny_config(block_pattern=pattern, num_layers=2, vocab_size=VOCAB)
    model = random_model(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, VOCAB, n).tolist() for n in (1, 30, 7, 2)]
    request = {
        "max_new_tokens": [70, 9, 40, 1],
        "sampling": SETTINGS[settings],
        "batch_size": 3,
    }
    plain = Sampler(model, compile_ahead=False)
    calls = {}
    for name, draft in {
        "itself": model,
        "a relative": _disturbed(model, 0.1),
        "a stranger": random_model(config, seed=1),
    }.items():
        sampler = Sampler(model, draft=draft, num_draft_tokens=3, compile_ahead=False)
        calls[name] = _agree(sampler, plain, prompts, **request)
    assert calls["itself"] < 0.35
    assert calls["itself"] < calls["a relative"] < calls["a stranger"] <= 1


@pytest.mark.parametrize("window", [20, 300])
def test_gemma_2_with_a_draft_writes_what_it_writes_alone(window, monkeypatch):
    """The text outgrows the capacity, which outgrows the smaller window or does not."""
    monkeypatch.setattr(chunk_reader, "MIN_CAPACITY", 16)
    config = dataclasses.replace(
        TINY_PRESETS["gemma2-27b"], attention_window=window, vocab_size=VOCAB
    )
    model = random_model(config)
    draft = _disturbed(model, 0.1)
    prompts = [[5], [*range(4, 11)], [*range(4, 34)]]
    request = {"max_new_tokens": [8, 30, 25], "sampling": SETTINGS["greedy"]}
    sampler = Sampler(model, draft=draft, num_draft_tokens=3, compile_ahead=False)
    plain = Sampler(model, compile_ahead=False)
    assert _agree(sampler, plain, prompts, **request, batch_size=2) < 1


@pytest.mark.slow
def test_prefixes_before_and_after():
    """The draft has not read the prefix; a stream leaves a plain prefix."""
    model = load_golden(GOLDEN)
    tokenizer = Tokenizer(GOLDEN / "tokenizer.model")
    plain = Sampler(model, tokenizer, compile_ahead=False)
    draft = _disturbed(model, 0.05)
    sampler = Sampler(model, tokenizer, draft=draft, compile_ahead=False)
    request = {"max_new_tokens": 30, "end_tokens": []}
    prefix = plain.prefill("The ferry left ")
    stream = sampler.stream("the harbour", prefix=prefix, **request)
    text = "".join(stream)
    plain_stream = plain.stream("the harbour", prefix=prefix, **request)
    assert text == "".join(plain_stream)
    after, expected = stream.prefix(), plain_stream.prefix()
    assert after.num_tokens == expected.num_tokens
    [goes_on], [goes_on_plain] = (
        plain([" and"], prefix=p, **request) for p in (after, expected)
    )
    assert goes_on.tokens == goes_on_plain.tokens


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"draft": 60}, "draft: expected a model of the same 40 tokens, got one of 60"),
        ({"num_draft_tokens": 0}, r"num_draft_tokens: expected .* from 1 to 32, got 0"),
        (
            {"num_draft_tokens": 33},
            r"num_draft_tokens: expected .* from 1 to 32, got 33",
        ),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(changes, match):
    if "draft" in changes:
        changes = {"draft": random_model(tiny_config(vocab_size=changes["draft"]))}
    with pytest.raises(ValueError, match=match):
        Sampler(random_model(tiny_config()), **changes)
