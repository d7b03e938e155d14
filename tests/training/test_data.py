"""Documents, their split, their packing, and that packed documents do not meet."""

import jax
import numpy as np
import pytest

from recurrentgemma.cache import check_positions
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import Document, read_documents, split_held_out
from recurrentgemma.training.data import PackedTokens, encode_document
from recurrentgemma.training.loop import BUNDLED_TOKENIZER
from recurrentgemma.training.step import batch_sums, mean_metrics, means
from tests.models import random_model, tiny_config
from tests.tolerances import assert_close

# Token 2 begins a document, 1 ends it; no other token is used twice.
DOCUMENTS = [[2, 10, 11, 12, 1], [2, 1], [2, 20, 21, 1], [2, 30, 31, 32, 33, 34, 1]]


def tiny_corpus(folder):
    (folder / "b").mkdir()
    (folder / "b" / "x.py").write_text("x = 1\n")
    (folder / "a.py").write_bytes(b"a = 1\r\n")
    (folder / "bad.py").write_bytes(b"\xff\xfe")
    (folder / "empty.py").write_text("")
    return folder


def test_documents_of_a_directory_and_of_a_file(tmp_path):
    folder = tiny_corpus(tmp_path)
    expected = [Document("a.py", "a = 1\r\n"), Document("b/x.py", "x = 1\n")]
    assert read_documents(folder) == expected
    assert read_documents(folder / "a.py") == expected[:1]


def test_sources_without_text_are_refused(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    for source in (tmp_path, tmp_path / "bad.txt", tmp_path / "missing"):
        with pytest.raises(ValueError, match="data: "):
            read_documents(source)


def test_standard_library_has_its_sources_and_tests_only():
    documents = read_documents("python-stdlib")
    names = {document.name for document in documents}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not [name for name in names if "site-packages" in name]
    assert [document.name for document in documents] == sorted(names)


def test_split_depends_on_each_name_alone():
    documents = [Document(f"{i}.py", "x") for i in range(2000)]
    training, held_out = split_held_out(documents, 0.05)
    assert 60 < len(held_out) < 140
    assert sorted(training + held_out, key=lambda d: int(d.name[:-3])) == documents
    few_training, few_held_out = split_held_out(documents[::3], 0.05)
    assert set(few_training) <= set(training)
    assert set(few_held_out) <= set(held_out)


def test_cut_documents_decode_to_the_same_text():
    tokenizer = Tokenizer(BUNDLED_TOKENIZER)
    text = "def f(self, x):\n    return x + 1\t# é\r\n" * 40
    document = Document("f.py", text)
    whole = encode_document(tokenizer, document)
    cut = encode_document(tokenizer, document, cut_seed=0)
    assert cut == encode_document(tokenizer, document, cut_seed=0)
    assert cut != encode_document(tokenizer, document, cut_seed=1)
    assert len(whole) < len(cut) < 1.1 * len(whole)
    for ids in (whole, cut):
        assert ids[0] == tokenizer.bos_id
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("row_tokens", [1, 3, 4, 17, 100])
def test_rows_hold_every_target_once(row_tokens):
    packed = PackedTokens(DOCUMENTS, row_tokens)
    batch = packed.rows(np.arange(packed.num_rows + 1))
    assert batch.tokens.shape == (packed.num_rows + 1, row_tokens)
    assert (batch.positions[-1] == -1).all()
    counted = batch.targets[batch.mask > 0]
    expected = [token for document in DOCUMENTS for token in document[1:]]
    np.testing.assert_array_equal(counted, expected)
    # Each counted target follows its input in one document.
    index = {t: (d, i) for d, ids in enumerate(DOCUMENTS) for i, t in enumerate(ids)}
    unique = (batch.mask > 0) & (batch.tokens > 2) & (batch.targets > 2)
    for token, target, position in zip(
        batch.tokens[unique],
        batch.targets[unique],
        batch.positions[unique],
        strict=True,
    ):
        document, place = index[token]
        assert index[target] == (document, place + 1)
        assert position == place
    check_positions(batch.positions)


def test_batches_are_a_function_of_the_step():
    packed = PackedTokens([list(range(2, 100))], 4)
    rows = packed.num_rows
    steps = [packed.shuffled_batch(step, 2, seed=0) for step in range(rows)]
    again = PackedTokens([list(range(2, 100))], 4).shuffled_batch(7, 2, seed=0)
    np.testing.assert_array_equal(steps[7].tokens, again.tokens)
    first = np.concatenate([batch.tokens[:, 0] for batch in steps])
    epochs = first[:rows], first[rows:]
    np.testing.assert_array_equal(np.sort(epochs[0]), np.sort(epochs[1]))
    assert len(set(epochs[0])) == rows
    assert (epochs[0] != epochs[1]).any()


def test_evaluation_batches_have_every_row_in_order():
    packed = PackedTokens(DOCUMENTS, 4)
    batches = list(packed.batches(2))
    tokens = np.concatenate([batch.targets[batch.mask > 0] for batch in batches])
    np.testing.assert_array_equal(tokens, [t for d in DOCUMENTS for t in d[1:]])
    assert len(list(packed.batches(2, limit=1))) == 1


@pytest.mark.parametrize(("documents", "row_tokens"), [(DOCUMENTS, 0), ([[2]], 4)])
def test_rows_that_cannot_be_are_refused(documents, row_tokens):
    with pytest.raises(ValueError, match="expected two tokens|at least 1"):
        PackedTokens(documents, row_tokens)


def test_the_loss_of_packed_documents_is_that_of_each_alone():
    model = random_model(tiny_config())
    packed = PackedTokens(DOCUMENTS, 17)
    sums = jax.jit(batch_sums)
    together, _ = sums(model, packed.rows(np.arange(1)))
    alone = [
        sums(model, PackedTokens([ids], 17).rows(np.arange(1)))[0] for ids in DOCUMENTS
    ]
    assert float(together["tokens"]) == sum(map(len, DOCUMENTS)) - 4
    assert_close(mean_metrics(together)["loss"], means(alone)["loss"], "loss")
