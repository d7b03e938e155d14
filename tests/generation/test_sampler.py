import dataclasses
import gc
import itertools
import json
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recurrentgemma.cache import Cache
from recurrentgemma.config import GriffinConfig
from recurrentgemma.generation import batching, chunk_reader
from recurrentgemma.generation import programs as decoding
from recurrentgemma.generation import sampling as sampling_lib
from recurrentgemma.generation.history import History
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling, row_keys
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer
from tests.golden_models import load_data, load_golden
from tests.models import TINY_PRESETS, random_model
from tests.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "sampler"
CASES = json.loads((GOLDEN / "cases.json").read_text())
END = 1
# All with both filters, some of which let everything pass: one program for all three.
GREEDY = Sampling(0, top_k=9, top_p=0.9)
PLAIN = Sampling(1, top_k=1000, top_p=1.0)
FILTERED = Sampling(2, top_k=20, top_p=0.9)
PENALIZED = Sampling(1.2, min_p=0.02, repetition_penalty=1.5)


@pytest.fixture(scope="module")
def sampler():
    tokenizer = Tokenizer(GOLDEN / "tokenizer.model")
    return Sampler(load_golden(GOLDEN), tokenizer, compile_ahead=False)


@pytest.fixture(scope="module")
def golden_data():
    return load_data(GOLDEN)


def _model(**changes):
    fields = {
        "vocab_size": 60,
        "width": 16,
        "mlp_width": 24,
        "num_layers": 2,
        "block_pattern": ("recurrent", "local_attention"),
        "num_heads": 2,
        "head_dim": 8,
        "attention_window": 9,
        "lru_width": 16,
        "num_gate_blocks": 2,
        "logits_soft_cap": 30.0,
    }
    return Griffin(GriffinConfig(**{**fields, **changes}), rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def tiny():
    """Without a tokenizer; end tokens are always given."""
    return Sampler(_model(), compile_ahead=False)


@jax.jit
def _plain_logits(model, tokens):
    return model.logits(model(tokens)[0])


def _forward(model, tokens):
    """Logits after each token, in one call without a cache."""
    padded = np.zeros((1, -(-len(tokens) // 64) * 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return _plain_logits(model, padded)[0, : len(tokens)]


def _until_end(tokens):
    tokens = list(tokens)
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_case(case, sampler, golden_data):
    """Greedy tokens and the logits they were chosen from, up to the first end token.

    `short_prompts_in_batch` holds what padding does to the original; the same prompts
    alone are the truth.
    """
    tokenizer, steps = sampler.tokenizer, case["total_generation_steps"]
    encode = tokenizer.encode
    if case["instruction_tuned_format"]:
        encode = tokenizer.format_turn
    prompts = [encode(prompt) for prompt in case["prompts"]]
    stops = case["end_sampling_at_eos_token"]
    samples = [None] * len(prompts)
    if steps:
        samples = sampler(
            prompts,
            max_new_tokens=steps,
            sampling=GREEDY,
            end_tokens=[END] if stops else [],
            return_logits=True,
        )
    for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        name = f"{case['name']}/row{i}/"
        if case["name"] == "short_prompts_in_batch":
            name = f"short_prompt_alone_{i}/row0/"
        np.testing.assert_array_equal(prompt, golden_data[name + "prompt_tokens"])
        tokens, skip = golden_data[name + "tokens"], 0
        logits = golden_data[name + "logits"] if case["has_logits"] else None
        if case["echo"]:
            skip = len(prompt)
            np.testing.assert_array_equal(tokens[:skip], prompt)
            forward = _forward(sampler.model, prompt)
            assert_close(forward, logits[:skip], "logits")
        if sample is None:
            continue
        expected = tokens[skip:]
        expected = _until_end(expected) if stops else list(expected)
        assert sample.tokens == expected
        assert sample.ended == (stops and expected[-1] == END)
        if logits is not None:
            assert_close(sample.logits, logits[skip : skip + len(expected)], "logits")


def test_text_of_a_call(sampler):
    """The text is the tokens' without the end token."""
    case = next(case for case in CASES if case["name"] == "alone_0")
    [prompt] = case["prompts"]
    settings = {"max_new_tokens": 40, "sampling": GREEDY, "end_tokens": [END]}
    [sample] = sampler([prompt], return_logits=True, **settings)
    assert sample.ended and sample.tokens[-1] == END
    assert sample.text == sampler.tokenizer.decode(sample.tokens[:-1])
    assert case["text"][0].startswith(sample.text)
    probability = jax.nn.log_softmax(sample.logits)
    np.testing.assert_allclose(
        sample.log_probs,
        np.take_along_axis(
            np.asarray(probability), np.array(sample.tokens)[:, None], 1
        )[:, 0],
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("settings", [GREEDY, PLAIN, FILTERED], ids=str)
def test_stream_is_the_call_in_pieces(sampler, settings):
    for seed in range(3):
        request = {"max_new_tokens": 90, "sampling": settings, "seed": seed}
        [sample] = sampler(["The ferry"], **request)
        pieces = list(sampler.stream("The ferry", **request))
        assert all(pieces) and len(pieces) > 1
        assert "".join(pieces) == sample.text


def test_stream_never_splits_a_character(sampler):
    """The model speaks in byte tokens; a forced one makes a three-byte character."""
    tokenizer = sampler.tokenizer
    ids = tokenizer.encode("\u20ac", add_bos=False)
    assert len(ids) == 3
    decoder = tokenizer.stream_decoder()
    assert [decoder.push([i]) for i in ids] == ["", "", "\u20ac"]


def test_the_default_end_tokens_are_end_and_end_of_turn(sampler):
    mask = sampler._inputs.end_mask(None)
    assert np.flatnonzero(mask).tolist() == [1, 5]


def test_empty_prompt_starts_from_the_begin_token(sampler):
    [sample] = sampler([""], max_new_tokens=3, sampling=GREEDY, return_logits=True)
    assert sample.prompt_tokens == [sampler.tokenizer.bos_id]
    assert len(sample.tokens) >= 1


def test_an_end_token_that_comes_first_ends_the_row(tiny):
    free = tiny([[2, 3, 4]], max_new_tokens=5, sampling=GREEDY, end_tokens=[])[0]
    first = free.tokens[0]
    assert len(free.tokens) == 5 and not free.ended
    [sample] = tiny([[2, 3, 4]], max_new_tokens=5, sampling=GREEDY, end_tokens=[first])
    assert sample.tokens == [first] and sample.ended
    assert sample.log_probs.shape == (1,)


@pytest.mark.parametrize("settings", [GREEDY, PLAIN, FILTERED, PENALIZED], ids=str)
def test_a_row_in_a_batch_is_what_it_is_alone(tiny, settings):
    """Other rows longer, shorter, of one token, ended early: nothing shows."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 60, n).tolist() for n in (1, 2, 23, 150)]
    request = {"max_new_tokens": 70, "sampling": settings}
    seeds = [5, 5, 7, 1]
    free = tiny(prompts, seed=seeds, end_tokens=[], **request)
    # Ends the second row early, and others where they happen to draw it.
    ends = [free[1].tokens[20]]
    batch = tiny(prompts, seed=seeds, end_tokens=ends, **request)
    assert batch[1].ended and len(batch[1].tokens) <= 21
    for prompt, seed, together in zip(prompts, seeds, batch, strict=True):
        [alone] = tiny([prompt], seed=seed, end_tokens=ends, **request)
        assert together.tokens == alone.tokens
        np.testing.assert_allclose(together.log_probs, alone.log_probs, atol=1e-5)


@pytest.mark.parametrize("settings", [GREEDY, PLAIN, FILTERED, PENALIZED], ids=str)
def test_a_row_in_a_refilled_batch_is_what_it_is_alone(tiny, settings):
    """Seven prompts through two slots, their lengths and limits all different."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 60, n).tolist() for n in (5, 40, 1, 130, 2, 17, 60)]
    limits = [30, 3, 70, 1, 9, 65, 20]
    ends = {"end_tokens": [11], "sampling": settings}
    together = tiny(prompts, max_new_tokens=limits, batch_size=2, seed=4, **ends)
    assert any(sample.ended for sample in together) or settings == GREEDY
    for i, sample in enumerate(together):
        assert sample.prompt_tokens == prompts[i]
        [alone] = tiny([prompts[i]], max_new_tokens=limits[i], seed=4 + i, **ends)
        assert sample.tokens == alone.tokens and sample.ended == alone.ended
        np.testing.assert_allclose(sample.log_probs, alone.log_probs, atol=1e-5)


@pytest.mark.slow
def test_refilling_grows_a_global_cache():
    """The later prompt needs more room than the slots were made with."""
    model = _model(block_pattern=("global_attention", "recurrent"), num_layers=2)
    sampler = Sampler(model, compile_ahead=False)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 60, n).tolist() for n in (5, 9, 300, 4)]
    request = {"max_new_tokens": 12, "end_tokens": [], "sampling": PLAIN}
    together = sampler(prompts, batch_size=2, **request)
    for i, sample in enumerate(together):
        [alone] = sampler([prompts[i]], seed=i, **request)
        assert sample.tokens == alone.tokens


def test_samples_of_one_prompt_read_it_once(tiny, monkeypatch):
    """They are what the prompt gives with each seed; at most one reading a prompt."""
    prompts = [[2, 3, 4] * 20, [7]]
    request = {"max_new_tokens": 15, "end_tokens": [], "sampling": PLAIN}
    alone = tiny([prompts[0]] * 3 + [prompts[1]] * 3, seed=9, **request)
    calls = []
    read_chunk = decoding.read_chunk
    monkeypatch.setattr(
        chunk_reader,
        "read_chunk",
        lambda *args: calls.append(args[2].shape) or read_chunk(*args),
    )
    forked = tiny(prompts, num_samples=3, seed=9, **request)
    assert [s.tokens for s in forked] == [s.tokens for s in alone]
    assert calls == [(1, size) for size in decoding.plan_chunks(59)]
    few = tiny(prompts, num_samples=3, seed=9, batch_size=2, **request)
    assert [s.tokens for s in few] == [s.tokens for s in alone]


def test_iterate_takes_prompts_as_it_needs_them(tiny):
    """Endless prompts; what finishes is handed out while others are waiting."""
    taken = []

    def prompts():
        for i in itertools.count():
            taken.append(i)
            yield [2, i % 60]

    request = {"max_new_tokens": 4, "end_tokens": [], "sampling": PLAIN}
    results = tiny.iterate(prompts(), batch_size=3, seed=5, **request)
    first = [next(results) for _ in range(6)]
    assert len(taken) <= 12
    assert sorted(index for index, _ in first) == [0, 1, 2, 3, 4, 5]
    for index, sample in first:
        [alone] = tiny([[2, index]], seed=5 + index, **request)
        assert sample.tokens == alone.tokens


STOP = Sampling(1.0, top_k=1000, top_p=1.0)


def test_a_stop_string_ends_a_row_and_is_cut_off(sampler):
    """Wherever it falls among the tokens; the text is the free one's up to it."""
    prompts = ["The ferry", "A", "Rain on"]
    request = {"max_new_tokens": 90, "sampling": STOP, "end_tokens": []}
    free = sampler(prompts, **request)
    cuts = 0
    for length in (1, 2, 3):
        for start in (4, 11, 30):
            stop = [sample.text[start : start + length] for sample in free]
            # The bytes of what may yet become a character are held back.
            if not all(stop) or "\ufffd" in "".join(stop):
                continue
            stopped = sampler(prompts, stop=stop, **request)
            for before, after in zip(free, stopped, strict=True):
                at = [before.text.find(s) for s in stop if s in before.text]
                assert after.text == before.text[: min(at)]
                assert after.ended and len(after.log_probs) == len(after.tokens)
                assert before.tokens[: len(after.tokens)] == after.tokens
                shown = sampler.tokenizer.decode(after.tokens)
                assert any(s in shown for s in stop)
                assert not any(
                    s in sampler.tokenizer.decode(after.tokens[:-1]) for s in stop
                )
                cuts += 1
    assert cuts >= 9
    pieces = sampler.stream(prompts[0], stop=[free[0].text[30:33]], **request)
    assert "".join(pieces) == free[0].text[: free[0].text.find(free[0].text[30:33])]


def test_an_int_seed_counts_up_along_the_rows(tiny):
    request = {"max_new_tokens": 20, "end_tokens": [], "sampling": PLAIN}
    counted = tiny([[2]] * 4, seed=8, **request)
    listed = tiny([[2]] * 4, seed=[8, 9, 10, 11], **request)
    assert [s.tokens for s in counted] == [s.tokens for s in listed]
    assert len({tuple(s.tokens) for s in counted}) == 4


@pytest.mark.parametrize("name", ["hawk-100m", "gemma2-27b"])
def test_decoding_equals_the_plain_forward(name):
    """Teacher forcing over prefill and blocks; a global cache is large enough."""
    sampler = Sampler(random_model(TINY_PRESETS[name]), compile_ahead=False)
    prompt = np.random.default_rng(1).integers(0, 40, 180).tolist()
    [sample] = sampler(
        [prompt],
        max_new_tokens=80,
        sampling=PLAIN,
        seed=6,
        end_tokens=[],
        return_logits=True,
    )
    expected = _forward(sampler.model, prompt + sample.tokens[:-1])
    expected = expected[len(prompt) - 1 :]
    # A key of its own for every step, so all steps can be drawn again at once.
    keys = row_keys(jnp.full(80, 6, jnp.uint32), jnp.arange(80))
    assert sample.tokens == sampling_lib.sample(expected, keys, PLAIN).tolist()
    assert_close(sample.logits, expected, "logits")


@pytest.mark.parametrize("length", [*range(40), 127, 128, 129, 900, 1024, 5000])
def test_plan_reads_everything_with_little_padding(length):
    sizes = decoding.plan_chunks(length)
    assert set(sizes) <= set(decoding.CHUNK_SIZES)
    assert sizes == sorted(sizes, reverse=True)
    # Only the last chunk is padded: by less than 16, or a quarter of itself.
    assert sum(sizes[:-1]) < length or not length
    assert 0 <= sum(sizes) - length <= max([15] + [size / 4 for size in sizes[-1:]])


def test_a_new_prompt_length_compiles_nothing():
    """After the first call of a batch size, whatever the lengths and settings."""
    sampler = Sampler(_model(width=24))
    rng = np.random.default_rng(2)

    def generate(length, **settings):
        prompt = rng.integers(0, 60, length).tolist()
        sampler([prompt], max_new_tokens=2, end_tokens=[length % 60], **settings)

    generate(3, sampling=GREEDY)
    sampler.wait_until_compiled()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    try:
        for length in rng.integers(1, 3000, 50):
            settings = Sampling(length / 1000, top_k=length, top_p=length / 3000)
            generate(length, sampling=settings, seed=int(length))
        assert compiled == []
        generate(3, sampling=Sampling())
        assert compiled != []
    finally:
        jax.monitoring.clear_event_listeners()


def test_a_thousand_calls_leave_nothing_behind(tiny):
    def generate(i):
        prompt = [2] * (i % 40 + 1)
        tiny([prompt], max_new_tokens=3, sampling=PLAIN, end_tokens=[])

    def count():
        programs = [decoding.read_chunk.jitted(1), decoding.decode_block.jitted(1)]
        sizes = [f._cache_size() for f in (decoding.new_cache, *programs)]
        return len(jax.live_arrays()), sizes

    generate(0), generate(39)
    before = count()
    for i in range(1000):
        generate(i)
    assert count() == before


def test_programs_of_few_batch_sizes_are_kept():
    """The memory of the others is free, however many there were."""
    client = jax.devices()[0].client
    gc.collect()
    before = len(client.live_executables())
    program = decoding.Program(lambda cache: cache.next_position + 1)
    for batch_size in range(1, 2 * decoding.MAX_BATCH_SIZES):
        program(Cache((), np.zeros(batch_size, np.int32)))
    gc.collect()
    assert len(client.live_executables()) - before == decoding.MAX_BATCH_SIZES
    for one in (decoding.read_chunk, decoding.score_chunk, decoding.decode_block):
        assert isinstance(one, decoding.Program)


def test_the_tokens_so_far_cost_nothing_without_a_penalty(tiny, monkeypatch):
    """No state of the size of the vocabulary."""
    seen = []

    def decode_block(models, state, *others, **static):
        seen.append(state.history.seen)
        return decoding.decode_block(models, state, *others, **static)

    monkeypatch.setattr(batching, "decode_block", decode_block)
    request = {"max_new_tokens": 3, "end_tokens": []}
    tiny([[2, 3]], sampling=PLAIN, **request)
    assert seen == [None]
    tiny([[2, 3]], sampling=PENALIZED, **request)
    assert seen[1].shape == (1, 60)


def test_the_prefix_of_a_stream_knows_all_tokens(sampler):
    request = {"max_new_tokens": 90, "sampling": PLAIN, "end_tokens": []}
    [sample] = sampler(["The ferry"], **request)
    stream = sampler.stream("The ferry", **request)
    assert "".join(stream) == sample.text
    history, tokens = stream.prefix().history, sample.prompt_tokens + sample.tokens
    assert np.flatnonzero(history.seen).tolist() == sorted(set(tokens))
    assert (*history.last_token, *history.num_tokens) == (tokens[-1], len(tokens))


def test_an_abandoned_stream_leaves_no_memory_behind(sampler):
    gc.collect()
    gc.disable()  # The memory is free at once, not at the next collection.
    try:
        before = len(jax.live_arrays())
        stream = sampler.stream("The", max_new_tokens=1000, sampling=PLAIN)
        next(stream)
        del stream
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_arguments_are_not_invalidated_or_changed(tiny):
    prompts, seeds, ends = [[2, 3]], [4], [5]
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(tiny.model)]
    for _ in range(2):
        tiny(prompts, max_new_tokens=3, sampling=PLAIN, seed=seeds, end_tokens=ends)
    assert (prompts, seeds, ends) == ([[2, 3]], [4], [5])
    for leaf, now in zip(leaves, jax.tree.leaves(tiny.model), strict=True):
        np.testing.assert_array_equal(leaf, now)


@pytest.mark.parametrize("penalty", [None, 1.5])
def test_a_decode_step_copies_no_weights_and_no_cache(penalty):
    """The parameters are read where they lie, the cache is updated in place."""
    model = _model(vocab_size=3000, attention_window=2000)
    cache = decoding.new_cache(model, batch_size=2, capacity=None)
    zeros = jnp.zeros(2, jnp.int32)
    state = decoding.DecodeState(
        caches=(cache,),
        history=History(zeros, zeros, jnp.zeros((2, 3000), bool) if penalty else None),
        seeds=zeros.astype(jnp.uint32),
        steps=zeros,
        limits=zeros,
        done=zeros > 0,
    )
    program = decoding.decode_block.jitted(2).lower(
        (model,),
        state,
        dataclasses.replace(GREEDY, repetition_penalty=penalty),
        np.zeros(3000, bool),
        np.int32(8),
        np.int32(2),
        keep_logits=False,
    )
    copies = [
        line for line in program.compile().as_text().splitlines() if " copy(" in line
    ]
    sizes = ("3000,16", "2,2000,1,8]", "pred[2,3000]")
    large = [line for line in copies if any(size in line for size in sizes)]
    assert large == []


def test_progress_counts_the_prompt(tiny):
    calls = []
    tiny(
        [[2] * 300],
        max_new_tokens=1,
        sampling=PLAIN,
        end_tokens=[],
        progress=lambda read, total: calls.append((read, total)),
    )
    assert calls[-1] == (299, 299)
    assert [read for read, _ in calls] == sorted({read for read, _ in calls})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompts": []}, "prompts: expected a list of at least one, got none"),
        ({"prompts": [[2], []]}, r"prompts\[1\]: expected at least one token"),
        ({"prompts": [[2, 60]]}, r"prompts\[0\]: expected tokens in \[0, 60\), got 60"),
        ({"prompts": [[-1]]}, "got -1"),
        (
            {"max_new_tokens": 0},
            r"max_new_tokens: expected an integer from 1 to .* got 0",
        ),
        ({"max_new_tokens": -3}, "max_new_tokens: .*got -3"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: .*got 1.5"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens: expected one for each of the 1"),
        ({"seed": [1, 2]}, "seed: expected one for each of the 1 rows, got 2"),
        ({"seed": -1}, "seed: expected"),
        ({"end_tokens": [60]}, "end_tokens: expected tokens in"),
        ({"end_tokens": None}, "end_tokens: expected a list of ids"),
        ({"num_samples": 0}, r"num_samples: expected an integer from 1 to .* got 0"),
        ({"batch_size": 0}, r"batch_size: expected an integer from 1 to .* got 0"),
        ({"stop": [""]}, "stop: expected a list of strings, none of them empty"),
        ({"stop": "x"}, "stop: expected a list of strings"),
        ({"stop": None}, "stop: expected a list of strings"),
        ({"stop": (x for x in [5])}, "stop: expected a list of strings"),
        ({"stop": (x for x in ["x"])}, "tokenizer: expected one"),
        ({"prompts": [1, 2]}, r"prompts\[0\]: expected a text or a list .*, got 1"),
        ({"prompts": 5}, "prompts: expected a list of at least one, got 5"),
        ({"prompts": b"ab"}, "prompts: expected a list of at least one, got b'ab'"),
        ({"prompts": [[2.9, 17.5]]}, r"prompts\[0\]: expected tokens in .* got 2.9"),
        ({"prompts": [np.array([2.0])]}, "expected tokens in .* got 2.0"),
        ({"prompts": [np.array([[2]])]}, r"expected tokens in .* got \[2\]"),
        ({"prompts": [["1"]]}, "expected tokens in .* got '1'"),
        ({"prompts": [[True]]}, "expected tokens in .* got True"),
        ({"prompts": [b"ab"]}, "tokenizer: expected one"),
        ({"end_tokens": [True]}, "end_tokens: expected tokens in .* got True"),
        ({"end_tokens": 5}, "end_tokens: expected .* got 5"),
        ({"sampling": None}, "sampling: expected a Sampling, got None"),
        ({"prefix": "p"}, "prefix: expected a Prefix or None, got 'p'"),
        ({"max_new_tokens": 2**31}, "max_new_tokens: expected .* got 2147483648"),
        ({"max_new_tokens": True}, "max_new_tokens: expected .* got True"),
        ({"seed": "1"}, "seed: expected an integer"),
        ({"stop": ["x"]}, "tokenizer: expected one"),
    ],
)
def test_a_bad_argument_is_named(tiny, kwargs, message):
    good = {"prompts": [[2]], "max_new_tokens": 1, "end_tokens": []}
    with pytest.raises(ValueError, match=message):
        tiny(**{**good, **kwargs})


def test_text_needs_a_tokenizer_that_fits(tiny, sampler):
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        tiny(["text"])
    with pytest.raises(ValueError, match="tokenizer: expected at most the 60"):
        Sampler(tiny.model, sampler.tokenizer)
    with pytest.raises(
        ValueError, match="prompts: expected a list of at least one, got 'text'"
    ):
        sampler("text")
    with pytest.raises(ValueError, match="max_new_tokens"):
        sampler.stream("text", max_new_tokens=0)


def test_bytes_are_text(sampler):
    request = {"max_new_tokens": 5, "sampling": GREEDY}
    from_bytes, from_text = sampler([b"The ferry", "The ferry"], **request)
    assert from_bytes.prompt_tokens == from_text.prompt_tokens
    assert sampler.score(b"The ferry").tokens == sampler.score("The ferry").tokens


def test_stop_strings_may_come_from_a_generator(sampler):
    request = {"max_new_tokens": 60, "sampling": STOP, "end_tokens": []}
    [free] = sampler(["The ferry"], **request)
    stop = free.text[8:10]
    [listed] = sampler(["The ferry"], stop=[stop], **request)
    [generated] = sampler(["The ferry"], stop=(s for s in [stop]), **request)
    assert listed.ended and generated.text == listed.text


def test_iterate_loses_nothing_before_a_bad_prompt(tiny):
    """The results of the prompts before it come first."""
    request = {"max_new_tokens": 4, "end_tokens": [], "sampling": PLAIN}
    results = tiny.iterate([[2], [3, 4], [99], [5]], batch_size=2, **request)
    expected = tiny([[2], [3, 4]], **request)
    found = dict(itertools.islice(results, 2))
    assert [found[i].tokens for i in (0, 1)] == [one.tokens for one in expected]
    with pytest.raises(ValueError, match=r"prompts\[2\]: expected tokens .* got 99"):
        next(results)
    results = tiny.iterate([[2], [3, 4]], batch_size=1, seed=[0], **request)
    assert next(results)[1].tokens == expected[0].tokens
    with pytest.raises(ValueError, match="seed: expected one for each prompt, got 1"):
        next(results)


def test_iterate_gives_a_result_before_it_takes_another_prompt(tiny):
    taken = []
    prompts = (taken.append(i) or [2, i] for i in itertools.count())
    request = {"max_new_tokens": 4, "end_tokens": [], "sampling": PLAIN}
    results = tiny.iterate(prompts, batch_size=3, **request)
    next(results)
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("prompts", ["abc", b"abc", 5, None])
def test_iterate_refuses_one_text(tiny, prompts):
    with pytest.raises(ValueError, match="prompts: expected an iterable of prompts"):
        tiny.iterate(prompts, batch_size=2, end_tokens=[])


def test_a_closed_stream_frees_its_memory_and_ends(sampler):
    gc.collect()
    before = len(jax.live_arrays())
    stream = sampler.stream("The", max_new_tokens=1000, sampling=PLAIN)
    next(stream)
    stream.close()
    assert len(jax.live_arrays()) == before
    assert list(stream) == []
    stream.close()
    with pytest.raises(ValueError, match="stream: expected one under way"):
        stream.prefix()


def test_a_sampler_and_its_scores_are_one_short_line(sampler):
    score = sampler.score([2, 10, 11, 12])
    assert repr(sampler) == "Sampler(0.1M parameters, text)"
    assert repr(score.prefix) == "Prefix(rows=1, tokens=4, 0.0 MB)"
    assert repr(score).startswith("Score(tokens=3, perplexity=")


def test_other_chunk_sizes_are_compiled_beside_the_text(sampler, monkeypatch):
    """After its first piece, in a thread; a failure there harms nothing."""
    compiled = []

    def compile_chunk(model, cache, size):
        compiled.append((cache.batch_size, size))
        assert threading.current_thread() is not threading.main_thread()
        if size == 128:
            raise RuntimeError("no such program")

    monkeypatch.setattr(chunk_reader, "_compile_chunk", compile_chunk)
    ahead = Sampler(sampler.model, sampler.tokenizer)
    request = {"max_new_tokens": 90, "sampling": GREEDY, "end_tokens": []}
    stream = ahead.stream("The ferry", **request)
    first = next(stream)
    assert compiled == []
    text = first + "".join(stream)
    ahead.wait_until_compiled()
    assert compiled == [(1, 16), (1, 128), (1, 1024)]
    assert text == "".join(sampler.stream("The ferry", **request))
    ahead(["The ferry", "A"], **request)
    ahead.wait_until_compiled()
    assert compiled[3:] == [(2, 16), (2, 128), (2, 1024)]


ENDING = """
import atexit, functools, time
from recurrentgemma.generation.chunk_reader import call_beside
done = []
compile_one = lambda i: time.sleep(0.2) or done.append(i)
events = call_beside([functools.partial(compile_one, i) for i in range(50)])
events[0].wait()
atexit.register(lambda: print(done))
"""


def test_an_interpreter_that_ends_waits_for_one_program():
    process = subprocess.run(
        [sys.executable, "-c", ENDING],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (process.stdout, process.stderr) == ("[0, 1]\n", "")
