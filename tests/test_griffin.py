"""The call contract: any chunking, padding and packing gives the plain forward's numbers.

Hypothesis draws splits and places into a few fixed shapes, so that little is compiled.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recurrentgemma import PRESETS, Griffin, Runtime, griffin, layers, load, save
from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.checkpoints.parameters import describe
from recurrentgemma.griffin import stack_layers, unstack_layers
from recurrentgemma.kernels.local_attention import KVCache
from tests.golden_models import named_leaves
from tests.jaxprs import equations
from tests.models import (
    TINY_PRESETS,
    WINDOW,
    forward,
    random_model,
    random_tokens,
    structure,
    tiny_config,
    tiny_preset,
)
from tests.tolerances import assert_close

BATCH = 2
LENGTH = 40
CALL_LENGTH = 8
CALLS = 8
BFLOAT16_SPLIT_FACTOR = 1.1
"""Bound on the error of a split bfloat16 run over that of an unsplit one."""

CONFIGS = {
    **TINY_PRESETS,
    # The rings of its local layers are no longer than the cache's capacity.
    "gemma2-wide": dataclasses.replace(
        TINY_PRESETS["gemma2-27b"], attention_window=2 * LENGTH
    ),
    **{
        kind: tiny_config(block_pattern=(kind,), num_layers=2)
        for kind in TEMPORAL_MIXERS
        if (kind,) not in {config.block_pattern for config in TINY_PRESETS.values()}
    },
    "complex_hawk": tiny_config(
        block_pattern=("recurrent",), num_layers=1, complex_rg_lru=True
    ),
}
parametrize_config = pytest.mark.parametrize("name", CONFIGS)
property_test = hypothesis.settings(
    max_examples=8, deadline=None, derandomize=True, database=None
)


def test_every_preset_is_among_those_tested():
    tested = {structure(config) for config in TINY_PRESETS.values()}
    assert {structure(tiny_preset(name)) for name in PRESETS} == tested


@functools.cache
def _model(name, compute_dtype="float32"):
    runtime = Runtime(compute_dtype=compute_dtype)
    return random_model(CONFIGS[name], runtime=runtime)


def _init_cache(model):
    return model.init_cache(BATCH, capacity=LENGTH)


@st.composite
def splits(draw):
    """For each row, the places of its LENGTH tokens in CALLS calls of CALL_LENGTH.

    Returns int [BATCH, CALLS, CALL_LENGTH]: index of the token, -1 at padding, which
    may stand anywhere; calls without a token are among them.
    """
    rows = []
    for _ in range(BATCH):
        slots = CALLS * CALL_LENGTH
        places = draw(st.permutations(range(slots)))[:LENGTH]
        row = np.full(slots, -1)
        row[np.sort(places)] = np.arange(LENGTH)
        rows.append(row.reshape(CALLS, CALL_LENGTH))
    return np.stack(rows)


@st.composite
def documents(draw):
    """Positions int [BATCH, LENGTH] of packed documents; some have one token."""
    rows = []
    for _ in range(BATCH):
        cuts = draw(st.lists(st.integers(1, LENGTH - 1), max_size=6, unique=True))
        starts = np.zeros(LENGTH, int)
        starts[cuts] = cuts
        rows.append(np.arange(LENGTH) - np.maximum.accumulate(starts))
    return np.stack(rows)


def _feed(model, tokens, positions, places):
    """Logits in token order, and the cache, of the tokens fed in these places."""
    cache = _init_cache(model)
    logits = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    for call in places.transpose(1, 0, 2):
        real = call >= 0
        rows = np.arange(BATCH)[:, None]
        call_positions = np.where(real, positions[rows, call], -1)
        out, cache = forward(model, tokens[rows, call], call_positions, cache)
        assert np.isfinite(out).all()
        row_index, column = np.nonzero(real)
        logits[row_index, call[real]] = np.asarray(out)[row_index, column]
    return logits, cache


def _assert_same_cache(actual, expected):
    """Equal counters and states; slots that hold nothing are not compared."""
    np.testing.assert_array_equal(actual.next_position, expected.next_position)
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, KVCache):
            np.testing.assert_array_equal(ours.positions, theirs.positions)
            held = np.asarray(ours.positions)[..., None, None] >= 0
            ours, theirs = (
                [np.where(held, leaf, 0) for leaf in (ring.keys, ring.values)]
                for ring in (ours, theirs)
            )
        for leaf, other in zip(
            jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
        ):
            assert_close(leaf, other, "cache")


@parametrize_config
@property_test
@hypothesis.given(positions=documents(), places=splits())
def test_any_split_padding_and_packing_is_the_plain_forward(name, positions, places):
    model = _model(name)
    tokens = np.asarray(random_tokens((BATCH, LENGTH)))
    plain, plain_cache = forward(model, tokens, positions, _init_cache(model))
    split, split_cache = _feed(model, tokens, positions, places)
    assert_close(split, plain, "logits")
    _assert_same_cache(split_cache, plain_cache)


@parametrize_config
@property_test
@hypothesis.given(positions=documents())
def test_packed_document_is_the_document_alone(name, positions):
    model = _model(name)
    tokens = np.asarray(random_tokens((BATCH, LENGTH)))
    packed, _ = forward(model, tokens, positions, _init_cache(model))
    row = 0
    starts = np.flatnonzero(positions[row] == 0)
    for start, end in zip(starts, [*starts[1:], LENGTH], strict=True):
        # What follows the document in its row is causally invisible.
        alone = np.roll(tokens[row], -start)
        logits, _ = forward(model, np.stack([alone] * BATCH), None, _init_cache(model))
        assert_close(logits[0, : end - start], packed[row, start:end], "logits")


@pytest.mark.parametrize("name", ["nano", "gemma2-27b", "min_gru"])
@hypothesis.settings(property_test, max_examples=3)
@hypothesis.given(positions=documents(), places=splits())
def test_gradients_flow_through_the_cache(name, positions, places):
    model = _model(name)
    tokens = random_tokens((BATCH, LENGTH))
    weights = jax.random.normal(jax.random.key(3), (BATCH, LENGTH))
    plain = _plain_gradient(model, tokens, positions, weights)
    split = _split_gradient(model, tokens, positions, weights, places)
    for key, expected in named_leaves(plain).items():
        try:
            assert_close(named_leaves(split)[key], expected, "gradient")
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from None


def _score(model, hidden, tokens, weights):
    log_probs = jax.nn.log_softmax(model.logits(hidden))
    chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * chosen)


@jax.jit
@jax.grad
def _plain_gradient(model, tokens, positions, weights):
    return _score(model, model(tokens, positions)[0], tokens, weights)


@jax.jit
@jax.grad
def _split_gradient(model, tokens, positions, weights, places):
    rows = jnp.arange(BATCH)[:, None]

    def call(cache, place):
        place_positions = jnp.where(place >= 0, positions[rows, place], -1)
        hidden, cache = model(tokens[rows, place], place_positions, cache)
        place_weights = jnp.where(place >= 0, weights[rows, place], 0)
        return cache, _score(model, hidden, tokens[rows, place], place_weights)

    _, scores = jax.lax.scan(call, _init_cache(model), places.transpose(1, 0, 2))
    return jnp.sum(scores)


@property_test
@hypothesis.given(places=splits())
def test_bfloat16_split_is_as_close_to_float32_as_unsplit(places):
    model, exact = _model("nano", "bfloat16"), _model("nano")
    tokens = np.asarray(random_tokens((BATCH, LENGTH)))
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    truth, _ = forward(exact, tokens, positions, _init_cache(exact))
    plain, _ = forward(model, tokens, positions, _init_cache(model))
    split, _ = _feed(model, tokens, positions, places)

    def rms(x):
        return np.sqrt(np.mean((np.asarray(x) - truth) ** 2))

    assert rms(split) <= BFLOAT16_SPLIT_FACTOR * rms(plain)


@pytest.mark.parametrize("start", [0, 10**6, 10**8])
@pytest.mark.parametrize(
    "length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, LENGTH]
)
def test_steps_equal_the_plain_forward_around_the_window(length, start):
    """Token by token, from any start; padding keeps the compiled shapes few."""
    model = _model("nano")
    tokens = random_tokens((BATCH, LENGTH), seed=1)
    index = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    positions = np.where(index < length, start + index, -1)
    plain, plain_cache = forward(model, tokens, positions, _init_cache(model))
    cache = _init_cache(model)
    for t in range(length):
        step = positions[:, t : t + 1].astype(np.int32)
        logits, cache = forward(model, tokens[:, t : t + 1], step, cache)
        assert_close(logits[:, 0], plain[:, t], "logits")
    _assert_same_cache(cache, plain_cache)


@pytest.mark.parametrize("name", ["nano", "nano-transformer"])
def test_numbers_do_not_depend_on_where_a_row_starts(name):
    """Attention sees distances alone, so position 1e8 is as good as position 5."""
    model = _model(name)
    tokens = random_tokens((BATCH, LENGTH))
    near, far = (
        forward(model, tokens, start + np.broadcast_to(np.arange(LENGTH), tokens.shape))
        for start in (5, 10**8)
    )
    assert_close(far[0], near[0], "logits")


def test_positions_continue_from_the_cache():
    model = _model("nano")
    tokens = random_tokens((BATCH, LENGTH))
    explicit = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    expected, expected_cache = forward(model, tokens, explicit, _init_cache(model))
    half = LENGTH // 2
    first, cache = forward(model, tokens[:, :half], None, _init_cache(model))
    second, cache = forward(model, tokens[:, half:], None, cache)
    assert_close(np.concatenate([first, second], axis=1), expected, "logits")
    _assert_same_cache(cache, expected_cache)


@parametrize_config
def test_no_cache_is_an_empty_cache(name):
    model = _model(name)
    tokens = random_tokens((BATCH, LENGTH))
    without, cache = forward(model, tokens)
    with_empty, filled = forward(model, tokens, None, _init_cache(model))
    assert_close(without, with_empty, "logits")
    _assert_same_cache(cache, filled)


@parametrize_config
def test_causal_and_isolated_by_gradients(name):
    """The gradient of a logit is zero at later tokens and other documents and rows."""
    model = _model(name)
    tokens = random_tokens((BATCH, LENGTH))
    start, probe = 13, 21
    index = np.arange(LENGTH)
    positions = np.broadcast_to(
        np.where(index < start, index, index - start), (BATCH, LENGTH)
    )

    @jax.jit
    @jax.grad
    def sensitivity(embeddings):
        # Each token has an embedding of its own.
        traced = jax.tree.map(lambda leaf: leaf, model)
        rows = embeddings.reshape(-1, model.config.width)
        traced.embedder.embedding = nnx.Param(rows)
        own = jnp.arange(BATCH * LENGTH, dtype=jnp.int32).reshape(BATCH, LENGTH)
        hidden, _ = traced(own, positions)
        return jnp.sum(hidden[0, probe] ** 2 * jnp.arange(model.config.width))

    embeddings = model.embedder.embedding[...][tokens]
    influence = np.abs(sensitivity(embeddings)).max(-1)
    visible = (index >= start) & (index <= probe)
    assert (influence[0, visible] > 0).all()
    assert (influence[0, ~visible] == 0).all()
    assert (influence[1] == 0).all()


@pytest.mark.parametrize("name", ["nano", "complex_hawk", "min_gru"])
def test_cache_shapes_do_not_depend_on_the_text(name):
    model = _model(name)
    empty = jax.eval_shape(lambda: model.init_cache(BATCH))
    for length in (1, LENGTH):
        _, cache = jax.eval_shape(forward, model, random_tokens((BATCH, length)))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(
            lambda x: (x.shape, x.dtype), empty
        )


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_stacked_layers_give_the_same_numbers(remat):
    config = tiny_config(num_layers=5, block_pattern=("recurrent", "local_attention"))
    model = random_model(config)
    runtime = Runtime(compute_dtype="float32", remat=remat)
    stacked = stack_layers(random_model(config, runtime=runtime))
    assert len(stacked.groups) == 2
    assert len(stacked.blocks) == 1
    tokens = random_tokens((BATCH, CALL_LENGTH))
    expected, expected_cache = forward(model, tokens, None, _init_cache(model))
    actual, cache = forward(stacked, tokens, None, _init_cache(stacked))
    assert_close(actual, expected, "logits")
    _assert_same_cache(cache, expected_cache)

    weights = jnp.ones(tokens.shape)
    gradient = _plain_gradient(model, tokens, None, weights)
    stacked_gradient = unstack_layers(_plain_gradient(stacked, tokens, None, weights))
    for key, value in named_leaves(gradient).items():
        assert_close(named_leaves(stacked_gradient)[key], value, "gradient")


def test_stacked_matrices_are_cast_once():
    """Before the loops over layers, which see no float32 matrix of a `Linear` layer."""
    config = tiny_config(num_layers=2, block_pattern=("recurrent",))
    runtime = Runtime(compute_dtype="bfloat16", remat=True)
    model = jax.eval_shape(stack_layers, describe(config, runtime))
    tokens = jnp.zeros((1, 4), jnp.int32)
    jaxpr = jax.make_jaxpr(_plain_gradient)(model, tokens, None, tokens)
    shape = config.num_layers, config.mlp_width, config.width
    loops = [
        {v.aval.dtype.name for v in (*e.invars, *e.outvars) if v.aval.shape == shape}
        for e in equations(jaxpr.jaxpr)
        if e.primitive.name == "scan"
    ]
    # Forward, and backward with the gradients.
    assert [dtypes for dtypes in loops if dtypes] == [{"bfloat16"}] * 2
    assert {leaf.dtype.name for leaf in jaxpr.out_avals} == {"float32"}


@parametrize_config
def test_native_checkpoints_round_trip(name, tmp_path):
    model = _model(name)
    save(tmp_path / "saved", model, None)
    loaded, _ = load(tmp_path / "saved")
    assert loaded.config == model.config
    for key, value in named_leaves(model).items():
        np.testing.assert_array_equal(named_leaves(loaded)[key], value)


def test_unstack_undoes_stack():
    model = random_model(tiny_config(num_layers=7))
    again = named_leaves(unstack_layers(stack_layers(model)))
    for key, value in named_leaves(model).items():
        np.testing.assert_array_equal(again[key], value)


def test_arguments_stay_valid():
    model = _model("nano")
    tokens, cache = random_tokens((BATCH, CALL_LENGTH)), _init_cache(model)
    first, _ = forward(model, tokens, None, cache)
    second, _ = forward(model, tokens, None, cache)
    np.testing.assert_array_equal(first, second)


def test_default_runtime_on_cpu_is_float32():
    model = Griffin(tiny_config(num_layers=1), rngs=nnx.Rngs(0))
    hidden, cache = model(random_tokens((1, 2)))
    assert hidden.dtype == cache.layers[0].conv.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": jnp.zeros(3, jnp.int32)}, r"tokens: expected .* \[B, T\]"),
        ({"tokens": jnp.zeros((1, 0), jnp.int32)}, "at least 1"),
        ({"tokens": jnp.zeros((2, 3))}, "tokens: expected integers"),
        ({"tokens": [[1, 2, 3]]}, "tokens: expected an array .* got list"),
        ({"tokens": jnp.full((2, 3), 40)}, "tokens: expected ids from 0 to 39, got 40"),
        ({"tokens": np.full((2, 3), -1)}, "tokens: expected ids from 0 to 39, got -1"),
        ({"positions": jnp.zeros((2, 4), jnp.int32)}, "shape of tokens"),
        ({"positions": jnp.zeros((2, 3))}, "positions: expected integers"),
        ({"cache": jnp.zeros((2, 3))}, "cache: expected a Cache"),
    ],
)
def test_bad_arguments(arguments, message):
    defaults = {"tokens": jnp.zeros((2, 3), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        _model("nano")(**{**defaults, **arguments})


def test_batch_of_tokens_and_cache_must_agree():
    model = _model("nano")
    with pytest.raises(ValueError, match="cache: expected 2 rows .* got 3"):
        model(random_tokens((2, 3)), cache=model.init_cache(3))
    with pytest.raises(ValueError, match="belongs to another model"):
        model(random_tokens((2, 3)), cache=_model("hawk-100m").init_cache(2))
    for fields in ({"lru_width": 36}, {"head_dim": 4}, {"block_pattern": ["min_gru"]}):
        other = random_model(tiny_config(**fields)).init_cache(2)
        with pytest.raises(
            ValueError, match="layer [02] the state of .* another model"
        ):
            model(random_tokens((2, 3)), cache=other)


def test_global_attention_needs_a_capacity():
    with pytest.raises(ValueError, match="capacity"):
        _model("nano-transformer").init_cache(1)
    with pytest.raises(ValueError, match="batch_size"):
        _model("nano").init_cache(0)


def test_eager_calls_are_compiled_calls():
    """One program a shape; weights that are edited in place are seen."""
    model = random_model(CONFIGS["nano"], seed=5)
    tokens = random_tokens((BATCH, CALL_LENGTH))
    expected, expected_cache = forward(model, tokens, None, model.init_cache(BATCH))
    cache = model.init_cache(BATCH)
    hidden, after = model(tokens, cache=cache)
    assert_close(model.logits(hidden), expected, "logits")
    _assert_same_cache(after, expected_cache)
    compiled = griffin._compiled_read._cache_size()
    model(tokens, cache=after)
    assert griffin._compiled_read._cache_size() == compiled
    model.final_norm.scale[...] = model.final_norm.scale[...] + 1
    changed, _ = model(tokens, cache=cache)
    assert griffin._compiled_read._cache_size() == compiled
    assert np.abs(changed - hidden).max() > 0.1


def test_a_module_in_the_place_of_the_rg_lru_runs_in_steps_too():
    class Doubled(layers.RGLRU):
        def __call__(self, x, chunk, h0):
            y, h = super().__call__(x, chunk, h0)
            return 2 * y, h

    model = random_model(tiny_config(block_pattern=("recurrent",), num_layers=1))
    mixer = model.blocks[0].mixer
    doubled = Doubled(32, 4, model.runtime, rngs=nnx.Rngs(0))
    nnx.update(doubled, nnx.state(mixer.rg_lru))
    mixer.rg_lru = doubled
    tokens = random_tokens((BATCH, 3))
    plain, _ = forward(model, tokens)
    cache = model.init_cache(BATCH)
    for t in range(3):
        logits, cache = forward(model, tokens[:, t : t + 1], None, cache)
        assert_close(logits[:, 0], plain[:, t], "logits")


@pytest.mark.parametrize("size", [1, 4, 12])
def test_tokens_past_the_capacity_are_nan_in_a_compiled_call(size):
    """In any split, from the first one on, until the next document."""
    model = _model("nano-transformer")
    tokens = random_tokens((BATCH, 12))
    documents = [[*range(12)], [*range(9), 0, 1, 2]]
    positions = np.array(documents)
    whole, _ = forward(model, tokens, positions, model.init_cache(BATCH, capacity=12))
    cache, logits = model.init_cache(BATCH, capacity=6), []
    for start in range(0, 12, size):
        part = slice(start, start + size)
        out, cache = forward(model, tokens[:, part], positions[:, part], cache)
        logits.append(out)
    logits = np.concatenate(logits, axis=1)
    lost = positions >= 6
    assert np.isnan(logits[lost]).all()
    assert_close(logits[~lost], whole[~lost], "logits")


def test_an_eager_call_grows_a_cache_that_is_too_small():
    model = _model("nano-transformer")
    tokens = random_tokens((BATCH, 9))
    expected, _ = forward(model, tokens)
    hidden, cache = model(tokens[:, :5])
    assert cache.capacity == 5
    for t in range(5, 9):
        hidden, cache = model(tokens[:, t : t + 1], cache=cache)
        assert_close(model.logits(hidden)[:, 0], expected[:, t], "logits")
    assert cache.capacity == 16


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_float32_products_have_the_precision_of_the_runtime(precision):
    runtime = Runtime(compute_dtype="float32", float32_precision=precision)
    model = describe(CONFIGS["nano"], runtime)

    def run(model, tokens):
        return model.logits(model(tokens)[0])

    program = jax.jit(run).lower(model, random_tokens((BATCH, CALL_LENGTH))).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) > len(model.blocks)
    for line in products:
        assert ("HIGHEST" in line) == (precision == "highest"), line


@pytest.mark.parametrize("hidden", [jnp.zeros((2, 3), jnp.int32), [1.0], None])
def test_logits_of_something_else(hidden):
    with pytest.raises(ValueError, match=r"hidden: expected .* \[B, T, 24\], got"):
        _model("nano").logits(hidden)


def test_models_and_caches_are_shown_in_one_line():
    model = _model("nano")
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    expected = f"Griffin(layers=3, width=24, {count:,} parameters in float32)"
    assert repr(model) == str(model) == expected
    assert repr(model.init_cache(2)) == "Cache(rows=2, layers=3, 0.0 MB)"
