"""Streams of tokens: the same in memory and in a cache, written whole, found again."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from recurrentgemma.checkpoints import find_checkpoint
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training import streams
from recurrentgemma.training.corpus import find_files
from recurrentgemma.training.documents import Cuts, encode_document, is_held_out
from recurrentgemma.training.sources import Collected
from recurrentgemma.training.streams import TokenSettings, stream_of, tokenize

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (i + 1) for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(find_checkpoint("nano") / "tokenizer.model")


@pytest.fixture
def settings(tokenizer):
    return TokenSettings(tokenizer, 0.3, Cuts(seed=0, characters=20))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "data" / f"{i}.py").write_text(text)
    return tmp_path / "data"


def assert_same(one, other):
    assert one.digests == other.digests
    for name in ("training", "held_out"):
        a, b = getattr(one, name), getattr(other, name)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
        assert a.tokens.dtype == b.tokens.dtype == np.uint16


def test_tokens_are_those_of_the_documents(tokenizer, settings):
    source = [Collected("mine", TEXTS)]
    found = tokenize("mine", source, settings)
    documents = list(source[0].documents())
    assert found.held_out is not None
    for stream, is_held, cuts in (
        (found.training, False, settings.cuts),
        (found.held_out, True, None),
    ):
        chosen = [d for d in documents if is_held_out(d.name, 0.3) == is_held]
        expected = stream_of(
            [id for span in d.spans(tokenizer, cuts) for id in span.ids] for d in chosen
        )
        for array, value in zip(stream, expected, strict=True):
            np.testing.assert_array_equal(array, value)
    assert found.num_documents == len(TEXTS)


def test_responses_alone_count(tokenizer):
    record = {"prompt": "def f(x):", "response": " return x"}
    found = tokenize("mine", [Collected("mine", [record])], TokenSettings(tokenizer))
    stream = found.training
    assert tokenizer.decode(stream.tokens[stream.counted].tolist()) == " return x"
    assert stream.has_responses


def test_where_all_would_be_held_out_none_is(settings):
    source = [Collected("mine", TEXTS[:1])]
    found = tokenize("mine", source, settings._replace(held_out_share=0.999999))
    assert found.held_out is None
    assert_all = tokenize("mine", source, settings._replace(held_out_share=0.0))
    np.testing.assert_array_equal(found.training.tokens, assert_all.training.tokens)


def test_a_cache_holds_the_same_and_is_read_again(folder, settings, monkeypatch):
    cache = folder.parent / "cache"
    files = find_files(folder)
    in_memory = tokenize("data", files, settings)
    written = tokenize("data", files, settings, cache)
    assert_same(written, in_memory)
    assert len(list(cache.iterdir())) == 1

    monkeypatch.setattr(streams, "documents_of", None)  # nothing is read again
    assert_same(tokenize("data", find_files(folder), settings, cache), in_memory)


def test_a_cache_is_written_and_read_in_flat_memory(folder, settings):
    lines = "".join(json.dumps({"text": f"{i} " * 250}) + "\n" for i in range(700))
    (folder / "a.jsonl").write_text(lines)
    files = find_files(folder)
    tracemalloc.start()
    try:
        found = tokenize("data", files, settings._replace(cuts=None), folder / "cache")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.training.tokens) * 7 > 1 << 20
    assert peak < 7 << 17


def test_another_file_tokenizer_or_setting_is_another_entry(folder, settings):
    cache = folder.parent / "cache"
    before = tokenize("data", find_files(folder), settings, cache)
    (folder / "3.py").write_text("another\n")
    after = tokenize("data", find_files(folder), settings, cache)
    differing = {f for f in before.digests if before.digests[f] != after.digests[f]}
    assert differing == {"3.py"}
    os.utime(folder / "4.py", ns=(0, 0))
    assert_same(tokenize("data", find_files(folder), settings, cache), after)
    others = [
        settings._replace(held_out_share=0.2),
        settings._replace(cuts=Cuts(1, 20)),
        settings._replace(cuts=None),
    ]
    for other in others:
        tokenize("data", find_files(folder), other, cache)
    assert len(list(cache.iterdir())) == 6


def test_a_damaged_entry_is_made_anew(folder, settings):
    cache = folder.parent / "cache"
    files = find_files(folder)
    tokenize("data", files, settings, cache)
    [entry] = cache.iterdir()
    tokens = entry / "training.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert_same(
        tokenize("data", files, settings, cache), tokenize("data", files, settings)
    )


def test_what_another_process_wrote_meanwhile_stays(folder, settings, monkeypatch):
    """Its maps, on a network file system, would end with its files."""
    cache, files = folder.parent / "cache", find_files(folder)
    write = streams._write

    def write_twice(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(streams, "_write", write)
            tokenize("data", files, settings, cache)
        return write(*arguments)

    monkeypatch.setattr(streams, "_write", write_twice)
    replaced = []
    monkeypatch.setattr("recurrentgemma._atomic._swap", lambda *_: replaced.append(_))
    found = tokenize("data", files, settings, cache)
    assert_same(found, tokenize("data", files, settings, cache))
    assert len(list(cache.iterdir())) == 1 and not replaced


def test_a_failure_leaves_nothing(folder, settings, monkeypatch):
    cache = folder.parent / "cache"

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(streams._Writer, "add", disk_full)
        with pytest.raises(
            OSError, match="data_cache: .*'data' .*No space left on dev"
        ):
            tokenize("data", find_files(folder), settings, cache)
    (folder.parent / "file").write_text("")
    with pytest.raises(OSError, match="^data_cache: could not write .*/file: "):
        tokenize("data", find_files(folder), settings, folder.parent / "file")
    (folder / "z.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="z.jsonl, line 1"):
        tokenize("data", find_files(folder), settings, cache)
    assert list(cache.iterdir()) == []


def test_many_files_have_one_digest(folder, settings, monkeypatch):
    monkeypatch.setattr(streams, "MAX_NAMED_FILES", 19)
    found = tokenize("data", find_files(folder), settings)
    assert list(found.digests) == ["its files"]


def test_a_tokenizer_without_turns_is_named(tmp_path):
    from tests.checkpoints.test_round_trips import TOKENIZER

    record = {"turns": [{"role": "user", "text": "a"}, {"role": "model", "text": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    settings = TokenSettings(Tokenizer(without_turns(TOKENIZER)))
    with pytest.raises(ValueError, match="data: here, a.jsonl: .*<end_of_turn>"):
        tokenize("here", find_files(tmp_path), settings)


def without_turns(path):
    model = Tokenizer(path).model_proto()
    for piece in model.pieces:
        piece.piece = piece.piece.replace("_of_turn>", "_of_other>")
    return model.SerializeToString()


def test_encoding_is_that_of_encode_document(tokenizer, settings):
    documents = list(Collected("mine", TEXTS).documents())
    held_out = [d for d in documents if is_held_out(d.name, 0.3)]
    expected = [id for d in held_out for id in encode_document(tokenizer, d)]
    found = tokenize("mine", [Collected("mine", TEXTS)], settings)
    assert found.held_out is not None
    assert found.held_out.tokens.tolist() == expected
