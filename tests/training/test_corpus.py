"""Names and paths as documents; their split."""

import json
import logging

import pytest

from recurrentgemma.training.corpus import Document, read_documents, split_held_out


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.py").write_text("x = 1\n")
    (tmp_path / "a.py").write_bytes(b"a = 1\r\n")
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.py").write_text("")
    return tmp_path


def test_documents_of_a_directory_and_of_a_file(folder):
    expected = [Document("a.py", "a = 1\r\n"), Document("b/x.py", "x = 1\n")]
    assert read_documents(folder) == expected
    assert read_documents(folder / "a.py") == expected[:1]


def test_files_that_are_no_text_are_left_out_with_a_word(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        read_documents(folder)
    [message] = caplog.messages
    assert message.startswith("data: 1 files") and message.endswith("as bad.py")


def test_sources_without_text_are_refused(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_text("")
    for source, message in [
        (tmp_path, "expected documents in .*, got 2 files without UTF-8 text"),
        (tmp_path / "bad.txt", r"UTF-8 text in '.*bad.txt', got another byte at 2"),
        (tmp_path / "empty.txt", "expected documents in"),
        (
            tmp_path / "missing",
            "a directory or a file, got '.*missing', which does not",
        ),
    ]:
        with pytest.raises(ValueError, match=f"^data: .*{message}"):
            read_documents(source)


def test_records_in_a_directory_are_records(folder):
    lines = [{"text": "one"}, {"prompt": "p", "response": "r"}]
    (folder / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [document.text for document in read_documents(folder)]
    assert texts == ["a = 1\r\n", "x = 1\n", "one", "pr"]


def test_a_state_that_is_of_no_dataset_is_a_text(tmp_path):
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / name).write_text('{"x": 1}')
    assert [document.text for document in read_documents(tmp_path)] == 2 * ['{"x": 1}']


def test_standard_library_has_its_sources_and_tests_only(caplog):
    documents = read_documents("python-stdlib")
    names = {document.name for document in documents}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not [name for name in names if "site-packages" in name]
    assert [document.name for document in documents] == sorted(names)
    assert not caplog.messages


def test_split_depends_on_each_name_alone():
    documents = [Document(f"{i}.py", "x") for i in range(2000)]
    training, held_out = split_held_out(documents, 0.05)
    assert 60 < len(held_out) < 140
    assert sorted(training + held_out, key=lambda d: int(d.name[:-3])) == documents
    few_training, few_held_out = split_held_out(documents[::3], 0.05)
    assert set(few_training) <= set(training)
    assert set(few_held_out) <= set(held_out)
