"""Answers of a scorer equal those of plain calls, whatever it shares and caches."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.checkpoints import load
from recurrentgemma.evaluation.answer_cache import AnswerCache
from recurrentgemma.evaluation.scorer import Continuation, Scorer, Text
from recurrentgemma.generation import programs
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from tests.models import forward, random_model, tiny_config

TOLERANCE = {"rel": 1e-5, "abs": 1e-5}


@pytest.fixture(scope="module")
def tokenizer():
    return load("nano")[1]


@pytest.fixture(scope="module", params=["griffin", "global"])
def sampler(request, tokenizer):
    pattern = ("recurrent", "local_attention" if request.param == "griffin" else "")
    config = tiny_config(
        vocab_size=tokenizer.vocab_size,
        block_pattern=tuple(part or "global_attention" for part in pattern),
        num_layers=2,
    )
    return Sampler(random_model(config), tokenizer, compile_ahead=False)


@pytest.fixture(scope="module")
def requests():
    """Two blocks of shots, questions with four choices, two of them odd."""
    rng = np.random.default_rng(0)

    def draw(count):
        return rng.integers(3, 4000, count).tolist()

    found = []
    for _ in range(2):
        shots = [2, *draw(150)]
        for _ in range(3):
            question = [*shots, *draw(20)]
            found += [Continuation(question, draw(n)) for n in (1, 2, 3, 20)]
    return [*found, Continuation([2], draw(5)), Continuation([2, 9], []), found[0]]


@pytest.fixture(scope="module")
def expected(sampler, requests):
    """Log-likelihoods from one plain call of the model for each request."""
    answers = []
    for context, tokens in requests:
        # One length: what comes later changes nothing before it.
        row = np.zeros((1, 256), np.int32)
        whole = [*context, *tokens]
        row[0, : len(whole)] = whole
        log_probs = jax.nn.log_softmax(forward(sampler.model, jnp.asarray(row))[0][0])
        places = np.arange(len(context), len(whole)) - 1
        chosen = np.asarray(log_probs)[places, tokens]
        best = np.asarray(log_probs.argmax(-1))[places] == np.array(tokens, int)
        answers.append((np.sum(chosen, dtype=np.float64), bool(best.all())))
    return answers


def same(found, expected):
    assert sorted(found) == list(range(len(expected)))
    for i, (log_prob, is_greedy) in enumerate(expected):
        assert found[i].log_prob == pytest.approx(log_prob, **TOLERANCE)
        assert found[i].is_greedy == is_greedy


def test_answers_are_those_of_plain_calls(sampler, requests, expected):
    scorer = Scorer(sampler, batch_size=3)
    found = dict(scorer.log_likelihoods(requests))
    same(found, expected)
    assert found[len(requests) - 2] == (0.0, True), "an empty continuation"
    read = scorer.tokens_read
    alone = Scorer(sampler, batch_size=3, share=False)
    same(dict(alone.log_likelihoods(requests)), expected)
    assert alone.tokens_read > 5 * read


def test_order_and_batch_size_do_not_matter(sampler, requests, expected):
    for size, step in ((1, 1), (3, -1)):
        mixed = requests[::step]
        found = dict(Scorer(sampler, batch_size=size).log_likelihoods(mixed))
        same(found, expected[::step])


def test_a_greedy_continuation_is_known_as_one(sampler):
    [sample] = sampler([[2, 5]], max_new_tokens=4, sampling=Sampling(0), end_tokens=[])
    scorer = Scorer(sampler, batch_size=3)
    wrong = [*sample.tokens[:3], (sample.tokens[3] + 1) % 4000]
    asked = [Continuation([2, 5], tokens) for tokens in (sample.tokens, wrong)]
    found = dict(scorer.log_likelihoods(asked))
    assert [found[i].is_greedy for i in (0, 1)] == [True, False]
    total = float(np.sum(sample.log_probs))
    assert found[0].log_prob == pytest.approx(total, **TOLERANCE)


def test_an_interrupted_evaluation_goes_on(sampler, requests, expected, tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerCache(path) as cache:
        answers = Scorer(sampler, batch_size=3, cache=cache).log_likelihoods(requests)
        for _ in range(5):
            next(answers)
        known = len(cache)
        assert 3 <= known < len(requests) - 2
    with path.open("ab") as file:
        file.write(b'{"key": "12')  # cut off
    with AnswerCache(path) as cache:
        assert len(cache) == known
        scorer = Scorer(sampler, batch_size=3, cache=cache)
        same(dict(scorer.log_likelihoods(requests)), expected)
        assert 0 < scorer.tokens_read
        again = Scorer(sampler, batch_size=1, cache=cache)
        same(dict(again.log_likelihoods(requests)), expected)
        assert again.tokens_read == 0


@pytest.fixture(scope="module")
def prompts():
    shots = [2, *range(100, 180)]
    ends = [[5], [6, 7], list(range(300, 340)), [8], [9], [10]]
    return [
        *(Text([*shots, *end], 12, ("e",)) for end in ends),
        Text([2, 30], 3),
        Text([2, 30], 9, sampling=Sampling(1.0)),
        Text([2, 30], 9, sampling=Sampling(1.0)),
    ]


def test_texts_are_those_of_prompts_alone(sampler, prompts, tmp_path):
    with AnswerCache(tmp_path / "texts.jsonl") as cache:
        scorer = Scorer(sampler, batch_size=3, cache=cache)
        found = dict(scorer.texts(prompts))
        for i, prompt in enumerate(prompts[:7]):
            [sample] = sampler(
                [prompt.context],
                max_new_tokens=prompt.max_new_tokens,
                stop=prompt.stop,
                sampling=prompt.sampling,
            )
            assert found[i] == sample.text
        assert any(text for text in found.values())
        assert found[7] != found[8], "drawn twice"
        assert scorer.tokens_read < 300 < sum(len(p.context) for p in prompts)
        again = Scorer(sampler, batch_size=1, cache=cache)
        assert dict(again.texts(prompts)) == found and not again.tokens_read
    backwards = dict(Scorer(sampler, batch_size=3).texts(prompts[:7][::-1]))
    assert [backwards[6 - i] for i in range(7)] == [found[i] for i in range(7)]


def test_another_model_gets_other_answers(sampler, tokenizer):
    cache, requests = AnswerCache(), [Continuation([2, 5], [7])]
    first = dict(Scorer(sampler, cache=cache, batch_size=3).log_likelihoods(requests))
    other = Sampler(random_model(sampler.model.config, seed=1), tokenizer)
    second = dict(Scorer(other, cache=cache, batch_size=3).log_likelihoods(requests))
    assert first != second and len(cache) == 2


def test_a_new_length_compiles_nothing(sampler, requests):
    scorer = Scorer(sampler, batch_size=3)
    list(scorer.log_likelihoods(requests))
    before = _programs()
    shorter = [Continuation([*c[:90], 77], t) for c, t in requests if t]
    assert dict(scorer.log_likelihoods(shorter)).keys() == set(range(len(shorter)))
    assert _programs() == before > 0


def _programs():
    """Programs of batches of three rows that are compiled."""
    pair = programs.read_chunk, programs.score_chunk
    return sum(program.jitted(3)._cache_size() for program in pair)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("Mine\n", "line 1: another content"),
        ('{"key": "1", "value": 2}\n{"key": "1"}\n', "line 2: another content"),
        ("[1]\n", "line 1: another content"),
    ],
)
def test_another_file_is_refused(content, match, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=match):
        AnswerCache(path)
    assert path.read_text() == content


def test_one_evaluation_at_a_time_writes_a_cache(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerCache(path) as cache:
        cache.add([("a", [1.5, True])])
        with pytest.raises(ValueError, match="that no other evaluation writes"):
            AnswerCache(path)
        assert json.loads(path.read_text()) == {"key": "a", "value": [1.5, True]}
    with AnswerCache(path) as cache:
        assert cache["a"] == [1.5, True]


def test_mistakes_are_told(sampler):
    scorer = Scorer(sampler, batch_size=3)
    with pytest.raises(ValueError, match=r"requests\[0\].context: expected at least"):
        list(scorer.log_likelihoods([Continuation([], [3])]))
    with pytest.raises(ValueError, match=r"requests\[1\].tokens: expected tokens in"):
        list(scorer.log_likelihoods([Continuation([2], [3]), Continuation([2], [-1])]))
    with pytest.raises(ValueError, match=r"requests\[0\]: expected at least one token"):
        list(scorer.texts([Text([])]))
    with pytest.raises(ValueError, match="sampler: expected one with a tokenizer"):
        Scorer(Sampler(sampler.model))
    with pytest.raises(ValueError, match="batch_size: expected"):
        Scorer(sampler, batch_size=0)
