"""A prefix is what was read: continued, saved, forked, it gives what the text gives."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from recurrentgemma import Runtime
from recurrentgemma import cache as cache_lib
from recurrentgemma.generation import chunk_reader, prefix_file
from recurrentgemma.generation import prefill as reading
from recurrentgemma.generation import prefix as prefix_lib
from recurrentgemma.generation.model_digest import (
    MIN_SAMPLES,
    ModelDigest,
    model_digest,
)
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from tests.generation.test_sampler import GOLDEN, Tokenizer, assert_close
from tests.golden_models import load_golden
from tests.models import TINY_PRESETS, forward, random_model, tiny_config

SETTINGS = [
    Sampling(0),
    Sampling(0.9, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.3),
]
PATTERN = ("recurrent", "local_attention", "global_attention")
VOCAB = 61
OLD_FILES = Path(__file__).parents[1] / "golden" / "prefixes"


@pytest.fixture(scope="module", autouse=True)
def _one_capacity():
    """Programs of one size of global cache, except where growth is the point."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_reader, "MIN_CAPACITY", 512)
        yield


@pytest.fixture(scope="module")
def sampler():
    """Of a model with every kind of state."""
    config = tiny_config(block_pattern=PATTERN, vocab_size=VOCAB)
    return Sampler(random_model(config), compile_ahead=False)


@pytest.fixture(scope="module")
def text_sampler():
    tokenizer = Tokenizer(GOLDEN / "tokenizer.model")
    return Sampler(load_golden(GOLDEN), tokenizer, compile_ahead=False)


def _tokens(count, seed=0, vocab_size=VOCAB):
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


@pytest.fixture(scope="module")
def gemma():
    """Of a tiny Gemma 2."""
    return Sampler(random_model(TINY_PRESETS["gemma2-27b"]), compile_ahead=False)


@pytest.mark.parametrize(
    ("name", "settings", "read"),
    [
        *itertools.product(["sampler"], SETTINGS, [1, 17, 150]),
        ("gemma", SETTINGS[1], 17),
    ],
)
def test_continuing_is_as_if_there_were_no_break(name, settings, read, request):
    """For every split: also before the first and after the last token."""
    sampler = request.getfixturevalue(name)
    tokens = _tokens(150, vocab_size=sampler.model.config.vocab_size)
    wanted = {"max_new_tokens": 20, "sampling": settings, "end_tokens": [], "seed": 3}
    [whole] = sampler([tokens], **wanted)
    prefix = sampler.prefill(tokens[:read])
    assert prefix.num_tokens.tolist() == [read]
    [after] = sampler([tokens[read:]], prefix=prefix, **wanted)
    assert after.tokens == whole.tokens
    [again] = sampler([tokens[read:]], prefix=prefix, **wanted)
    assert again.tokens == whole.tokens, "the prefix was changed by its use"


def test_extending_reads_on(sampler):
    tokens = _tokens(300)
    once = sampler.prefill(tokens)
    parts = None
    for start, stop in itertools.pairwise((0, 1, 2, 40, 299, 300)):
        parts = sampler.prefill(tokens[start:stop], prefix=parts)
    assert parts.num_tokens.tolist() == [300] and parts.history.last_token == tokens[-1]
    np.testing.assert_array_equal(parts.history.seen, once.history.seen)
    request = {"max_new_tokens": 10, "sampling": SETTINGS[1], "end_tokens": []}
    [a], [b] = (sampler([[]], prefix=p, **request) for p in (once, parts))
    assert a.tokens == b.tokens


def test_a_stream_of_tokens_is_read_piece_by_piece(sampler, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_TOKENS", 64)
    tokens = _tokens(500)
    taken = []

    def stream():
        for token in tokens:
            taken.append(token)
            yield token

    seen = []
    progress = lambda read, total: seen.append((read, total, len(taken)))
    streamed = sampler.prefill(stream(), progress=progress)
    assert all(total is None for _, total, _ in seen)
    assert all(ahead - read <= 65 for read, _, ahead in seen)
    plain = sampler.prefill(tokens)
    for a, b in zip(
        jax.tree.leaves(streamed.cache), jax.tree.leaves(plain.cache), strict=True
    ):
        assert_close(a, b, "cache")
    request = {"max_new_tokens": 10, "sampling": SETTINGS[0], "end_tokens": []}
    [a], [b] = (sampler([[]], prefix=p, **request) for p in (streamed, plain))
    assert a.tokens == b.tokens


def test_one_prefix_answers_many_questions(sampler):
    """Forked over a batch, also through fewer slots; nothing of it is read again."""
    text = _tokens(200)
    prefix = sampler.prefill(text)
    questions = [_tokens(n, seed=n) for n in (3, 1, 30, 12, 7)]
    request = {
        "max_new_tokens": 12,
        "sampling": SETTINGS[1],
        "end_tokens": [],
        "seed": 1,
    }
    read = []
    progress = lambda done, total: read.append(total)
    answers = sampler(questions, prefix=prefix, progress=progress, **request)
    assert set(read) == {30}
    refilled = sampler(questions, prefix=prefix, batch_size=2, **request)
    for i, question in enumerate(questions):
        [alone] = sampler([text + question], **{**request, "seed": 1 + i})
        assert answers[i].tokens == refilled[i].tokens == alone.tokens


def test_rows_are_taken_repeated_and_joined(sampler):
    texts = [_tokens(n, seed=n) for n in (30, 90, 5)]
    rows = [sampler.prefill(text) for text in texts]
    joined = prefix_lib.concatenate(rows)
    picked = joined.take([2, 0]).repeat(2)
    assert picked.num_tokens.tolist() == [5, 5, 30, 30]
    request = {"max_new_tokens": 8, "sampling": SETTINGS[1], "end_tokens": []}
    seeds = [7, 8, 9, 10]
    answers = sampler([[1]] * 4, prefix=picked, seed=seeds, **request)
    for seed, which, answer in zip(seeds, (2, 2, 0, 0), answers, strict=True):
        [alone] = sampler([[*texts[which], 1]], seed=seed, **request)
        assert answer.tokens == alone.tokens


def test_a_saved_prefix_continues_like_the_one_in_memory(sampler, tmp_path):
    prefix = prefix_lib.concatenate([sampler.prefill(_tokens(n)) for n in (50, 70)])
    path = tmp_path / "deep" / "text.prefix"
    prefix.save(path)
    prefix.take([0]).save(path)
    prefix.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["text.prefix"]
    loaded = Prefix.load(path, sampler.model)
    for a, b in zip(
        jax.tree.leaves(prefix.cache), jax.tree.leaves(loaded.cache), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for before, after in zip(prefix.history, loaded.history, strict=True):
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["version"] == "3"


def test_a_bfloat16_prefix_survives_its_file(tmp_path):
    config = tiny_config(block_pattern=PATTERN[:2], vocab_size=VOCAB)
    sampler = Sampler(
        random_model(config, runtime=Runtime(compute_dtype="bfloat16")),
        compile_ahead=False,
    )
    prefix = sampler.prefill(_tokens(40))
    prefix.save(tmp_path / "p")
    loaded = Prefix.load(tmp_path / "p", sampler.model)
    for a, b in zip(
        jax.tree.leaves(prefix.cache), jax.tree.leaves(loaded.cache), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("pattern", [PATTERN[:2], PATTERN[2:]], ids="-".join)
def test_a_prefix_has_one_size_unless_attention_is_global(pattern, monkeypatch):
    """A global cache grows while a text is read, and nothing of it is lost."""
    monkeypatch.setattr(chunk_reader, "MIN_CAPACITY", 16)
    config = tiny_config(block_pattern=pattern, num_layers=2, vocab_size=VOCAB)
    sampler = Sampler(random_model(config), compile_ahead=False)
    tokens = _tokens(300)
    short = sampler.prefill(tokens[:10])
    long = sampler.prefill(tokens[10:], prefix=short)
    assert (long.num_bytes > short.num_bytes) == (pattern == PATTERN[2:])
    request = {"max_new_tokens": 5, "sampling": SETTINGS[0], "end_tokens": []}
    [after], [whole] = (
        sampler([[1]], prefix=long, **request),
        sampler([[*tokens, 1]], **request),
    )
    assert after.tokens == whole.tokens


def _tune(model, name):
    """The model with every parameter of a name changed a little."""

    def change(path, leaf):
        changed = name in jax.tree_util.keystr(path)
        return leaf * 1.02 + 0.01 if changed else leaf

    return jax.tree_util.tree_map_with_path(change, model)


def test_only_the_model_that_read_it_may_use_it(sampler, tmp_path):
    prefix = sampler.prefill(_tokens(20))
    prefix.save(tmp_path / "p")
    scales = Sampler(_tune(sampler.model, "scale"), compile_ahead=False)
    kernels = Sampler(_tune(sampler.model, "kernel"), compile_ahead=False)
    config = tiny_config(vocab_size=VOCAB, mlp_width=40)
    other = Sampler(random_model(config), compile_ahead=False)
    for stranger, why in (
        (scales, "fine-tuned sibling"),
        (kernels, "fine-tuned sibling"),
        (other, "another architect"),
    ):
        with pytest.raises(ValueError, match=why):
            Prefix.load(tmp_path / "p", stranger.model)
        with pytest.raises(ValueError, match=why):
            stranger([[1]], prefix=prefix, end_tokens=[])
        with pytest.raises(ValueError, match=why):
            stranger.prefill([1], prefix=prefix)


def test_every_parameter_enters_the_digest(sampler):
    """Not its dtype: a checkpoint may be loaded in any."""
    leaves, structure = jax.tree.flatten(sampler.model)

    def digest(leaves):
        return model_digest(jax.tree.unflatten(structure, leaves))

    digests = {digest(leaves)}
    for i, leaf in enumerate(leaves):
        digests.add(digest([*leaves[:i], leaf + 0.5, *leaves[i + 1 :]]))
    assert len(digests) == 1 + len(leaves)
    rounded = [leaf.astype("bfloat16") for leaf in leaves]
    assert digest(rounded) == digest(leaves)


def test_every_row_and_column_of_a_large_parameter_enters_the_digest():
    """LoRA changes all of a matrix, an edit of a head a few rows or columns."""
    vocab_size, width = MIN_SAMPLES // 8, 24
    model = random_model(tiny_config(vocab_size=vocab_size, width=width))
    embedding = np.asarray(model.embedder.embedding[...])
    assert embedding.shape == (vocab_size, width) and embedding.size > MIN_SAMPLES

    def digest(values):
        model.embedder.embedding[...] = values
        return model_digest(model)

    rng, changes = np.random.default_rng(0), []
    low_rank = 0.01 * rng.standard_normal((vocab_size, 1)) @ np.ones((1, width))
    changes.append(low_rank.astype(np.float32))
    for place in (np.s_[7], np.s_[-1], *(np.s_[:, i] for i in range(width))):
        changes.append(np.zeros_like(embedding))
        changes[-1][place] = 0.1
    digests = {digest(embedding), *(digest(embedding + change) for change in changes)}
    assert len(digests) == 1 + len(changes)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_digest_does_not_depend_on_devices(kind):
    model = random_model(tiny_config(vocab_size=MIN_SAMPLES // 8))
    mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])

    def place(leaf):
        cut = PartitionSpec("data") if leaf.shape[0] % 2 == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, cut))

    assert model_digest(jax.tree.map(place, model)) == model_digest(model)


def test_an_edit_in_place_is_noticed():
    """And costs nothing where there was none."""
    model = random_model(tiny_config(vocab_size=VOCAB))
    sampler = Sampler(model, compile_ahead=False)
    prefix = sampler.prefill([1, 2, 3])
    kernel = model.blocks[0].mlp.down.kernel
    before = kernel[...]
    kernel[...] = before + 0.1
    with pytest.raises(ValueError, match="fine-tuned sibling"):
        sampler.prefill([4], prefix=prefix)
    kernel[...] = before
    sampler.prefill([4], prefix=prefix)


def test_a_digest_is_computed_once(sampler, monkeypatch):
    calls = []
    digest_of = ModelDigest(sampler.model)
    monkeypatch.setattr(
        "recurrentgemma.generation.model_digest.model_digest",
        lambda model: calls.append(model) or "digest",
    )
    assert [digest_of() for _ in range(3)] == ["digest"] * 3 and len(calls) == 1


def test_a_bad_file_is_refused(sampler, tmp_path):
    path, model = tmp_path / "p", sampler.model
    sampler.prefill(_tokens(20)).save(path)
    good = path.read_bytes()
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)

    def refused(match):
        with pytest.raises(ValueError, match=match):
            Prefix.load(path, model)

    path.write_bytes(good[: len(good) // 2])
    refused("damaged")
    path.write_bytes(b"no such thing")
    refused("no prefix, or a damaged one")
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    refused("do not fit their digest")
    save_file(arrays, path, {**metadata, "version": "4"})
    refused("version 4 of the prefix format, which is newer")
    save_file(arrays, path)
    refused("not a prefix")
    path.unlink()
    refused("There is no prefix")


def _write(path, arrays, metadata):
    """A file whose digest fits, whatever it holds."""
    metadata = {**metadata}
    metadata["content_digest"] = prefix_file._content_digest(arrays, metadata)
    save_file(arrays, path, metadata)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("last_token", 99999, "expected last_token from 0 to 60, got 99999"),
        ("last_token", -1, "expected last_token from 0 to 60, got -1"),
        ("num_tokens", -3, "expected num_tokens from 1 to 2147483647, got -3"),
        ("next_position", -3, "expected next_position from 0 to 2147483647, got -3"),
        (
            "version",
            "0",
            "expected a version from 1 to 3 of the prefix format, got '0'",
        ),
        ("version", "two", "expected a version from 1 to 3"),
        ("version", "4", "newer than 3"),
        ("capacity", "-1", "damaged"),
        ("capacity", "100", "expected layers.2.keys of shape .*, got"),
    ],
)
def test_a_file_of_strange_values_is_refused(sampler, tmp_path, name, value, match):
    path = tmp_path / "p"
    sampler.prefill(_tokens(20)).save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    if isinstance(value, str):
        metadata[name] = value
    else:
        arrays[name] = np.full_like(arrays[name], value)
    _write(path, arrays, metadata)
    with pytest.raises(ValueError, match=match) as error:
        Prefix.load(path, sampler.model)
    assert "\n" not in str(error.value)


def test_a_file_of_other_arrays_is_refused(sampler, tmp_path):
    path = tmp_path / "p"
    sampler.prefill(_tokens(20)).save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    for name in ("last_token", "seen", "layers.0.h"):
        for other in (None, arrays[name][..., :0], arrays[name][None]):
            changed = {**arrays, name: other}
            if other is None:
                del changed[name]
            _write(path, changed, metadata)
            with pytest.raises(ValueError, match="expected .* of shape"):
                Prefix.load(path, sampler.model)


def test_a_flipped_bit_of_the_header_is_noticed(sampler, tmp_path):
    path = tmp_path / "p"
    sampler.prefill(_tokens(20)).save(path)
    good = path.read_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    for place in range(size):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"^.+$"):
            prefix_file.read(path)


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_older_versions_are_read(version):
    """In version 1 the layers of a kind shared the positions of their keys."""
    config = tiny_config(
        block_pattern=("recurrent", "local_attention", "global_attention", "min_gru"),
        num_layers=4,
        width=8,
        mlp_width=8,
        num_heads=2,
        head_dim=4,
        lru_width=8,
        num_gate_blocks=2,
    )
    model = random_model(config)
    texts = [[2, 5, 7, 11, 13, 17, 19, 23, 29, 31], [3, 1, 4, 1, 5]]
    prefix = Prefix.load(OLD_FILES / f"version_{version}.prefix", model)
    prefix.check_model(model_digest(model))
    assert prefix.num_tokens.tolist() == [len(text) for text in texts]
    assert prefix.history.last_token.tolist() == [text[-1] for text in texts]
    assert prefix.cache.capacity == 128
    for row, text in enumerate(texts):
        _, cache = forward(
            model, np.array([text[:-1]]), None, model.init_cache(1, capacity=128)
        )
        loaded = prefix.take([row]).cache
        assert jax.tree.structure(loaded) == jax.tree.structure(cache)
        for ours, theirs in zip(
            jax.tree.leaves(loaded), jax.tree.leaves(cache), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_file_whose_local_rings_are_longer_than_the_capacity(tmp_path):
    """As version 3 had them first: the window's slots, whatever the capacity."""
    config = tiny_config(
        block_pattern=("local_attention", "global_attention"),
        num_layers=2,
        width=8,
        mlp_width=8,
        num_heads=2,
        head_dim=4,
        attention_window=200,
    )
    model = random_model(config)
    text = [[2, 5, 7, 11, 13, 17, 19, 23, 29, 31], [3, 1, 4, 1, 5]]
    prefix = Prefix.load(OLD_FILES / "version_3.prefix", model)
    assert prefix.cache.capacity == 128
    for row, tokens in enumerate(text):
        empty = model.init_cache(1, capacity=128)
        _, cache = forward(model, np.array([tokens[:-1]]), None, empty)
        loaded = prefix.take([row]).cache
        for ours, theirs in zip(
            jax.tree.leaves(loaded), jax.tree.leaves(cache), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
    prefix.save(tmp_path / "p")
    again = Prefix.load(tmp_path / "p", model)
    jax.tree.map(np.testing.assert_array_equal, again.cache, prefix.cache)
    old, new = (
        path.stat().st_size for path in (OLD_FILES / "version_3.prefix", tmp_path / "p")
    )
    assert new < old


def test_a_failed_save_leaves_what_was_there(sampler, tmp_path, monkeypatch):
    path = tmp_path / "p"
    prefix = sampler.prefill(_tokens(20))
    path.write_bytes(b"mine")

    def no_space(arrays, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_file, "save_file", no_space)
    with pytest.raises(ValueError, match="No space left"):
        prefix.save(path)
    assert path.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["sampler", "gemma"])
def test_scores_are_the_plain_forwards(name, request):
    """For any chunking: whole, after a prefix, token by token."""
    sampler = request.getfixturevalue(name)
    tokens = _tokens(200, vocab_size=sampler.model.config.vocab_size)
    logits = forward(sampler.model, np.array([tokens]))[0][0, :-1]
    expected = jax.nn.log_softmax(logits)[np.arange(199), np.array(tokens[1:])]
    whole = sampler.score(tokens)
    assert whole.tokens == tokens[1:]
    assert_close(whole.log_probs, expected, "logits")
    assert whole.prefix.num_tokens.tolist() == [200]
    prefix, parts = None, []
    for start, stop in itertools.pairwise((0, 1, 2, 19, 150, 200)):
        score = sampler.score(tokens[start:stop], prefix=prefix)
        prefix = score.prefix
        parts.append(score.log_probs)
    assert_close(np.concatenate(parts), expected, "logits")
    assert whole.perplexity == pytest.approx(np.exp(-np.mean(expected)), rel=1e-4)
    assert np.isnan(whole.bits_per_byte)
    assert repr(whole).endswith("bits_per_byte=nan for token ids)")


def test_text_is_scored_in_bits_per_byte(text_sampler):
    text = "Rain fell on the harbour – and on the ferry.\n"
    score = text_sampler.score(text)
    assert score.num_bytes == len(text.encode()) == len(text) + 2
    assert score.tokens == text_sampler.tokenizer.encode(text, add_bos=False)
    bits = -np.sum(score.log_probs) / np.log(2)
    assert score.bits_per_byte == pytest.approx(bits / score.num_bytes, rel=1e-5)


def test_an_endless_stream_is_scored_as_it_comes(text_sampler, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_TOKENS", 100)
    lines = [f"line {i} of the harbour\n" for i in range(60)]
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield lines[i % 60]

    scores = list(itertools.islice(text_sampler.score_stream(endless()), 5))
    count = len(taken)
    ids = [text_sampler.tokenizer.bos_id]
    for i in range(count):
        ids += text_sampler.tokenizer.encode(lines[i % 60], add_bos=False)
    assert sum(score.num_bytes for score in scores) == sum(
        len(lines[i % 60].encode()) for i in range(count)
    )
    plain = text_sampler.score(ids)
    streamed = np.concatenate([score.log_probs for score in scores])
    assert_close(streamed, plain.log_probs, "logits")
    assert all(len(score.tokens) < 150 for score in scores)


def test_many_texts_are_scored_as_each_alone(sampler, text_sampler):
    """Ragged, padded and after a prefix; the global cache grows for the longest."""
    prefix = sampler.prefill(_tokens(20, seed=9))
    calls = []
    progress = lambda done, total: calls.append((done, total))
    for before in (None, prefix):
        texts = [_tokens(n, seed=n) for n in (3, 70, 1, 150, 20)]
        scores = sampler.score_many(
            iter(texts), batch_size=3, prefix=before, progress=progress
        )
        for text, score in zip(texts, scores, strict=True):
            alone = sampler.score(text, prefix=before)
            assert score.tokens == alone.tokens and score.prefix is None
            assert_close(score.log_probs, alone.log_probs, "logits")
    assert calls == [(3, 5), (5, 5)] * 2
    texts = ["A ferry –", "Rain"]
    for text, score in zip(texts, text_sampler.score_many(texts), strict=True):
        assert score.bits_per_byte == pytest.approx(
            text_sampler.score(text).bits_per_byte, rel=1e-5
        )
    assert sampler.score_many([]) == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (["a", "b"], "text: expected one text, .* got a list with texts; use score_m"),
        (["abc", 5], "text: expected one text"),
        (iter(["abc", 5]), "text: expected lines alone or token ids alone, got 5"),
        (iter([5, "abc"]), "text: expected lines alone or token ids alone, got 'abc'"),
        (5, "text: expected a text, an open file or token ids, got 5"),
        ([True], "text: expected tokens in .* got True"),
    ],
)
def test_one_text_is_scored_or_read(text_sampler, text, match):
    with pytest.raises(ValueError, match=match):
        text_sampler.score(text)


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ("ab", "texts: expected a list of texts, got 'ab'"),
        ([[1], []], r"texts\[1\]: expected at least one token"),
        ([1, 2], r"texts\[0\]: expected a text or a list of token ids, got 1"),
    ],
)
def test_bad_texts_are_named(text_sampler, texts, match):
    with pytest.raises(ValueError, match=match):
        text_sampler.score_many(texts)


@pytest.mark.parametrize("empty", ["", [], iter(())])
def test_nothing_to_read_is_an_error_except_after_the_begin_token(text_sampler, empty):
    if empty == "":
        assert text_sampler.prefill(empty).num_tokens.tolist() == [1]
        assert text_sampler.score(empty).tokens == []
    else:
        with pytest.raises(ValueError, match="at least one token"):
            text_sampler.prefill(empty)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda s, p: s.prefill([1, 999]),
            r"text: expected tokens in \[0, 61\), got 999",
        ),
        (lambda s, p: s.prefill([1.5]), "text: expected tokens in .* got 1.5"),
        (lambda s, p: s.prefill("text"), "tokenizer: expected one"),
        (lambda s, p: s.prefill([1], prefix=p), "expected one row, got 2"),
        (lambda s, p: s([[1]] * 3, prefix=p, end_tokens=[]), "expected one row or 3"),
        (
            lambda s, p: p.take([2]),
            "rows: expected a list of at least one index from 0 to 1",
        ),
        (lambda s, p: p.repeat(0), "at least 1"),
        (lambda s, p: prefix_lib.concatenate([]), "at least one"),
    ],
)
def test_a_bad_argument_is_named(sampler, call, match):
    two = sampler.prefill([1, 2]).repeat(2)
    with pytest.raises(ValueError, match=match):
        call(sampler, two)


def test_a_prefix_of_a_cache_is_that_of_its_text(sampler, tmp_path):
    """Also from a file."""
    tokens = _tokens(20)
    model = sampler.model
    empty = model.init_cache(1, capacity=512)
    _, cache = model(np.array([tokens[:-1]]), cache=empty)
    made = Prefix.from_cache(model, cache, tokens[-1])
    read = sampler.prefill(tokens)
    np.testing.assert_array_equal(made.num_tokens, read.num_tokens)
    made.save(tmp_path / "own.prefix")
    for prefix in (made, Prefix.load(tmp_path / "own.prefix", model)):
        wanted = {"max_new_tokens": 8, "sampling": Sampling(0), "end_tokens": []}
        [ours], [expected] = (
            sampler([[5, 6]], prefix=p, **wanted) for p in (prefix, read)
        )
        assert ours.tokens == expected.tokens


def _with_leaf(cache, name, value):
    """The cache with another array in one leaf."""
    leaves = {**cache_lib.named_leaves(cache), name: value}
    return jax.tree.unflatten(jax.tree.structure(cache), leaves.values())


def test_what_no_text_leads_to_is_refused(sampler):
    model = sampler.model
    empty = model.init_cache(2, capacity=512)
    _, cache = model(np.array([_tokens(9), _tokens(9, 1)]), cache=empty)
    leaves = {n: np.array(x) for n, x in cache_lib.named_leaves(cache).items()}

    def changed(name, index, value):
        leaf = leaves[name].copy()
        leaf[index] = value
        return _with_leaf(cache, name, leaf)

    h, ring = "layers.0.h", "layers.1.positions"
    for wrong, message in (
        (_with_leaf(cache, h, leaves[h][:, :-1]), rf"{h} to be float32\[2, 32\], got"),
        (_with_leaf(cache, h, leaves[h].astype(np.float16)), "got float16"),
        (changed(h, (1, 3), np.nan), f"finite numbers in {h}"),
        (changed("next_position", 0, -1), "next_position of at least 0"),
        (changed("next_position", 1, 12), r"layers.1.positions the last positions"),
        (changed(ring, (0, 2), 40), r"layers.1.positions the last positions"),
        (changed(ring, (0, 8 % 6), -1), r"layers.1.positions the last positions"),
        (changed("layers.2.positions", 1, -2), "row 1, which read more than"),
        (cache_lib.make_rewindable(cache, model.config, 2), "to be"),
    ):
        with pytest.raises(ValueError, match=f"cache: expected .*{message}"):
            Prefix.from_cache(model, wrong, 3)
    for fields, message in (
        ({"last_token": VOCAB}, "last_token: expected 2 integers from 0 to 60"),
        ({"last_token": [1, 2, 3]}, "last_token: expected 2 integers"),
        ({"last_token": 1, "num_tokens": 0}, "num_tokens: expected 2 integers from 1"),
        ({"last_token": 1, "seen": [[True]]}, "seen: expected booleans"),
    ):
        with pytest.raises(ValueError, match=message):
            Prefix.from_cache(model, cache, **fields)
    good = Prefix.from_cache(model, cache, [3, 4], num_tokens=[10, 30])
    np.testing.assert_array_equal(good.num_tokens, [10, 30])
    assert good.history.seen[1, 4] and good.history.seen.sum() == 2
