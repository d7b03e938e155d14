import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.generation import sampling as sampling_lib
from recurrentgemma.generation.sampling import Sampling

VOCAB = 50
sample = jax.jit(sampling_lib.sample)


def _logits(rows=4, seed=0, scale=3.0):
    return scale * jax.random.normal(jax.random.key(seed), (rows, VOCAB))


def _keys(rows, step=0):
    return sampling_lib.row_keys(
        jnp.arange(rows, dtype=jnp.uint32), jnp.full(rows, step, jnp.int32)
    )


def _kept(logits, **kwargs):
    return np.isfinite(sampling_lib.filter_logits(logits, Sampling(**kwargs)))


def test_greedy_takes_the_maximum_whatever_the_filters():
    logits = _logits()
    for kwargs in ({}, {"top_k": 3}, {"top_p": 0.5}):
        tokens = sample(logits, _keys(4), Sampling(temperature=0, **kwargs))
        np.testing.assert_array_equal(tokens, np.argmax(logits, -1))


@pytest.mark.parametrize("k", [1, 2, 7, VOCAB, 10 * VOCAB])
def test_top_k_keeps_the_k_largest(k):
    logits = _logits()
    rank = np.argsort(np.argsort(-np.asarray(logits), -1), -1)
    np.testing.assert_array_equal(_kept(logits, top_k=k), rank < k)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_sufficient_set(p):
    logits = np.asarray(_logits(scale=1.0), np.float64)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for row, kept in zip(
        probability, _kept(jnp.asarray(logits, jnp.float32), top_p=p), strict=True
    ):
        order = np.argsort(-row)
        # A token is kept if those before it do not reach p yet.
        before = np.cumsum(row[order]) - row[order]
        np.testing.assert_array_equal(kept[order], before < p)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 1])
def test_min_p_keeps_what_is_probable_beside_the_first(share):
    logits = np.asarray(_logits(scale=1.0), np.float64)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = probability >= share * probability.max(-1, keepdims=True)
    assert share in (0, 1) or not kept.all()
    np.testing.assert_array_equal(_kept(jnp.asarray(logits), min_p=share), kept)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 3.0])
def test_a_penalty_is_paid_by_the_tokens_of_the_row(penalty):
    """A positive logit is divided, a negative one multiplied; greedy pays it too."""
    logits = np.asarray(_logits())
    seen = np.random.default_rng(0).random((4, VOCAB)) < 0.5
    expected = logits.copy()
    for row in range(4):
        for token in np.flatnonzero(seen[row]):
            down = logits[row, token] > 0
            expected[row, token] *= 1 / penalty if down else penalty
    np.testing.assert_allclose(
        sampling_lib.penalize(jnp.asarray(logits), seen, penalty), expected, rtol=1e-6
    )
    settings = Sampling(0, repetition_penalty=penalty)
    np.testing.assert_array_equal(
        sample(logits, _keys(4), settings, seen), np.argmax(expected, -1)
    )


def test_top_p_counts_what_top_k_left():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    # After top-k = 2 the first token alone has 4/7 of the probability.
    np.testing.assert_array_equal(
        _kept(logits, top_k=2, top_p=0.5), [[True, False, False, False]]
    )


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(top_p=1.2e-38),
        Sampling(top_k=1),
        Sampling(min_p=1),
        Sampling(1e-45, top_p=0.5),
        Sampling(top_k=1, repetition_penalty=1.2e-38),
        Sampling(top_k=1, repetition_penalty=3e38),
    ],
    ids=str,
)
def test_the_most_probable_token_always_stays(settings):
    """At the smallest and largest numbers that float32 holds."""
    logits = jnp.abs(_logits())
    seen = np.zeros((4, VOCAB), bool)
    tokens = np.argmax(logits, -1)
    np.testing.assert_array_equal(sample(logits, _keys(4), settings, seen), tokens)
    seen[:] = True
    drawn = sample(logits, _keys(4), settings, seen)
    assert np.all(np.isfinite(np.take_along_axis(logits, drawn[:, None], 1)))


def test_the_threshold_never_cuts_the_largest_logit():
    """Also where rounding leaves no probability to reach."""
    settings = jax.tree.map(lambda leaf: 0.0, Sampling(top_p=0.5))
    kept = np.isfinite(sampling_lib.filter_logits(_logits(), settings))
    np.testing.assert_array_equal(kept.argmax(-1), np.argmax(_logits(), -1))
    assert np.all(kept.sum(-1) == 1)


def test_ties_with_the_last_one_kept_are_kept():
    logits = jnp.array([[1.0, 0.0, 0.0, -1.0, -2.0]])
    np.testing.assert_array_equal(_kept(logits, top_k=2), [[1, 1, 1, 0, 0]])


def test_filters_leave_the_kept_logits_and_masked_rows_alone():
    logits = _logits().at[:, 10:].set(-jnp.inf)
    filtered = sampling_lib.filter_logits(logits, Sampling(top_k=20, top_p=1.0))
    np.testing.assert_array_equal(filtered, logits)


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(min_p=0.1),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(settings):
    draws = 20000
    logits = jnp.broadcast_to(_logits(rows=1, scale=1.5), (draws, VOCAB))
    tokens = sample(logits, _keys(draws), settings)
    expected = jax.nn.softmax(
        sampling_lib.filter_logits(logits[:1] / settings.temperature, settings)
    )[0]
    observed = np.bincount(tokens, minlength=VOCAB) / draws
    # Five standard deviations of a binomial share.
    bound = 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12
    assert np.all(np.abs(observed - expected) <= bound)


def test_a_row_depends_on_its_own_seed_and_step_only():
    logits, keys = _logits(), _keys(4)
    together = sample(logits, keys, Sampling())
    for i in range(4):
        alone = sample(logits[i : i + 1], keys[i : i + 1], Sampling())
        assert alone[0] == together[i]
    flat = jnp.zeros((64, VOCAB))
    assert np.any(
        np.asarray(sample(flat, _keys(64), Sampling()))
        != np.asarray(sample(flat, _keys(64, step=1), Sampling()))
    )


def test_a_new_setting_compiles_nothing():
    logits, keys = _logits(), _keys(4)
    sample(logits, keys, Sampling(top_k=3, top_p=0.5))
    before = sample._cache_size()
    for settings in (
        Sampling(temperature=0, top_k=4, top_p=1),
        Sampling(temperature=2, top_k=40, top_p=0.25),
    ):
        sample(logits, keys, settings)
    assert sample._cache_size() == before


def test_tiny_temperature_is_finite_and_greedy():
    tokens = sample(_logits(), _keys(4), Sampling(temperature=1e-38))
    np.testing.assert_array_equal(tokens, np.argmax(_logits(), -1))


def test_log_prob_is_the_log_softmax():
    logits, tokens = _logits(), jnp.array([0, 3, 7, 49])
    expected = jax.nn.log_softmax(logits)[jnp.arange(4), tokens]
    np.testing.assert_allclose(
        sampling_lib.log_prob(logits, tokens), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"repetition_penalty": True}, "repetition_penalty"),
        # Zero or infinite in float32.
        ({"top_p": 1e-40}, "top_p"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty"),
        ({"repetition_penalty": 1e39}, "repetition_penalty"),
        ({"temperature": 1e39}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"top_k": 2**31}, "top_k"),
    ],
)
def test_a_bad_number_is_named(kwargs, name):
    with pytest.raises(ValueError, match=f"{name}: expected .*got"):
        Sampling(**kwargs)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True, "1"])
def test_a_bad_seed_is_named(seed):
    with pytest.raises(ValueError, match="seed: expected"):
        sampling_lib.check_seed(seed)
