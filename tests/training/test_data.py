"""From a config to batches: mixtures, held-out data, caches, changes, mistakes."""

import doctest
import json
import logging

import numpy as np
import pytest

from recurrentgemma.checkpoints import find_checkpoint
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training import data
from recurrentgemma.training.corpus import parse_sources, read_documents
from recurrentgemma.training.data import DataConfig, check_unchanged, open_data
from recurrentgemma.training.packing import PackedTokens

ANSWERS = [
    {"prompt": f"def f{i}():", "response": f"\n    return {i}\n"} for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(find_checkpoint("nano") / "tokenizer.model")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with `answers.jsonl` and a folder of `books`."""
    monkeypatch.chdir(tmp_path)
    write_answers(tmp_path, ANSWERS)
    (tmp_path / "books").mkdir()
    for i in range(30):
        (tmp_path / "books" / f"{i}.txt").write_text(f"Chapter {i}\n\nText. " * 9)
    return tmp_path


def write_answers(folder, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "answers.jsonl").write_text(lines)


def config(**fields):
    defaults = {
        "data": "answers.jsonl:0.7,books:0.3",
        "batch_size": 3,
        "sequence_length": 24,
        "held_out_share": 0.2,
    }
    return DataConfig(**{**defaults, **fields})


def tokens_of(batches):
    return np.concatenate([np.asarray(batch.tokens) for batch in batches])


def test_the_example(here, tokenizer):
    [example] = doctest.DocTestFinder().find(
        open_data,
        "open_data",
        module=data,
        globs={**vars(data), "tokenizer": tokenizer},
    )
    (here / "book.txt").write_text("A book. " * 99)
    assert doctest.DocTestRunner().run(example).failed == 0
    assert len(example.examples) == 5


def test_a_mixture_resumes_from_any_step_and_from_a_cache(here, tokenizer):
    training, held_out = open_data(config(), tokenizer, seed=1)
    batches = [training.batch(step) for step in range(20)]
    for cache in (None, "cache", "cache"):
        again, again_held_out = open_data(config(data_cache=cache), tokenizer, seed=1)
        for step in (19, 3):
            for array, value in zip(again.batch(step), batches[step], strict=True):
                np.testing.assert_array_equal(array, value)
        np.testing.assert_array_equal(
            tokens_of(again_held_out.batches(4)), tokens_of(held_out.batches(4))
        )
    another, _ = open_data(config(), tokenizer, seed=2)
    assert (another.batch(3).tokens != batches[3].tokens).any()


def test_responses_alone_count_and_stay_with_their_prompts(here, tokenizer):
    training, _ = open_data(config(data="answers.jsonl"), tokenizer, seed=0)
    for batch in (training.batch(step) for step in range(4)):
        for targets, mask, positions in zip(
            batch.targets, batch.mask, batch.positions, strict=True
        ):
            text = tokenizer.decode(targets[mask > 0].tolist())
            assert text.startswith("\n    return ") and "def" not in text
            assert positions[0] == 0
    continuous, _ = open_data(
        config(data="answers.jsonl", order="continuous"), tokenizer, seed=0
    )
    assert any(continuous.batch(step).positions[0, 0] > 0 for step in range(4))


def test_held_out_documents_are_not_trained_on(here, tokenizer):
    training, held_out = open_data(config(data="books"), tokenizer, seed=0)

    def chapters(batches):
        text = tokenizer.decode(tokens_of(batches).ravel().tolist())
        return {part.split("\n")[0] for part in text.split("Chapter ")[1:]}

    assert held_out is not None
    steps = range(training.num_rows // 3 + 1)
    assert not chapters(map(training.batch, steps)) & chapters(held_out.batches(4))


def test_held_out_data_of_its_own(here, tokenizer):
    all_of_it, _ = open_data(config(data="books", held_out_share=0), tokenizer, 0)
    training, held_out = open_data(
        config(data="books", held_out_data="answers.jsonl"), tokenizer, 0
    )
    np.testing.assert_array_equal(training.batch(5).tokens, all_of_it.batch(5).tokens)
    assert held_out is not None
    [batch] = held_out.batches(held_out.num_rows)
    assert tokenizer.decode(batch.targets.ravel().tolist()).count("def f") == 40


def test_collections_are_sources_by_name(here, tokenizer):
    training, _ = open_data(
        config(data="mine:1,books:1"), tokenizer, 0, collections={"mine": ANSWERS}
    )
    from_file, _ = open_data(config(data="answers.jsonl:1,books:1"), tokenizer, 0)
    np.testing.assert_array_equal(training.batch(2).tokens, from_file.batch(2).tokens)


def test_responses_that_do_not_fit_are_counted_in_the_log(here, tokenizer, caplog):
    long = [{"prompt": "x = 1\n" * 30, "response": "y"}]
    long += [{"prompt": "a", "response": "y = 2\n" * 30}]
    write_answers(here, ANSWERS + long)
    with caplog.at_level(logging.WARNING, logger="absl"):
        open_data(config(data="answers.jsonl", held_out_share=0), tokenizer, 0)
    [message] = caplog.messages
    assert "1 documents are longer than a row and lose their ends, and 1 are" in message


def test_a_source_without_any_response_that_fits_is_named(here, tokenizer):
    write_answers(here, [{"prompt": "x = 1\n" * 30, "response": "y"}])
    with pytest.raises(
        ValueError, match="^data: answers.jsonl: sequence_length: .* 24"
    ):
        open_data(config(data="answers.jsonl"), tokenizer, 0)


def test_data_that_changed_is_refused_when_a_run_goes_on(here, tokenizer):
    path = here / "data.json"

    def start(**fields):
        check_unchanged(path, open_data(config(**fields), tokenizer, 0)[0])

    start()
    start()
    start(data_cache="cache")
    (here / "books" / "7.txt").touch()
    start(data_cache="cache")

    (here / "books" / "7.txt").write_text("Another chapter 7")
    (here / "books" / "new.txt").write_text("One more")
    with pytest.raises(ValueError, match="content in books: 7.txt and 1 more; restore"):
        start(data_cache="cache")
    write_answers(here, ANSWERS[1:])
    with pytest.raises(ValueError, match="content in answers.jsonl: answers.jsonl;"):
        start()
    write_answers(here, ANSWERS)
    with pytest.raises(ValueError, match="content in books: 0.txt and 29 more"):
        start(data="answers.jsonl")


def test_another_tokenizer_is_refused_by_its_name(here, tokenizer):
    training, _ = open_data(config(data="books"), tokenizer, 0)
    check_unchanged(here / "data.json", training)
    model = tokenizer.model_proto()
    model.trainer_spec.model_prefix = "another"
    other, _ = open_data(config(data="books"), Tokenizer(model.SerializeToString()), 0)
    with pytest.raises(ValueError, match="other content in the tokenizer: model;"):
        check_unchanged(here / "data.json", other)


def test_sources_and_weights(here):
    (here / "a,b:2").write_text("x")
    assert parse_sources("books") == [("books", None)]
    assert parse_sources("books:2, answers.jsonl:0.5") == [
        ("books", 2.0),
        ("answers.jsonl", 0.5),
    ]
    assert parse_sources("a,b:2") == [("a,b:2", None)]
    assert parse_sources("python-stdlib,books") == [
        ("python-stdlib", None),
        ("books", None),
    ]
    assert parse_sources("gone:x") == [("gone:x", None)]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("books:0,answers.jsonl:1", "data: weight of books: .* above 0, got 0"),
        ("books:-1,answers.jsonl:1", "data: weight of books: .* above 0, got -1"),
        ("books:nan", "data: weight of books: .* got nan"),
        (
            "books:1,answers.jsonl",
            "data: expected a weight for each source or for none",
        ),
        ("books,", "data: expected sources separated by commas"),
        ("", "data: expected sources separated by commas"),
        ("books:1,books:2", "data: .* each once, got 'books:1,books:2'"),
        ("books:1,gone:2", "data: .* got 'gone', which does not exist"),
    ],
)
def test_bad_sources_are_named(here, tokenizer, sources, message):
    with pytest.raises(ValueError, match=message):
        open_data(config(data=sources), tokenizer, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"sequence_length": -1}, "sequence_length: expected .* got -1"),
        ({"order": "sorted"}, "order: expected one of shuffled, continuous, got 'sort"),
        ({"characters_per_cut": -1}, "characters_per_cut: .* got -1"),
        ({"held_out_share": 1.0}, "held_out_share: expected a number of at least 0"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_texts_of_one_source_are_packed_as_they_always_were(here, tokenizer):
    """The rows, and their order, of a run with a single source of texts."""
    training, _ = open_data(config(data="books", held_out_share=0), tokenizer, seed=4)
    documents = [
        data.encode_document(tokenizer, document, cut_seed=4)
        for document in read_documents("books")
    ]
    packed = PackedTokens(documents, 24)
    for step in (0, 1, packed.num_rows):
        slots = np.arange(3 * step, 3 * step + 3)
        rows = [
            np.random.default_rng([4, n // packed.num_rows]).permutation(
                packed.num_rows
            )[n % packed.num_rows]
            for n in slots
        ]
        expected = packed.rows(np.array(rows))
        for array, value in zip(training.batch(step), expected, strict=True):
            np.testing.assert_array_equal(array, value)
