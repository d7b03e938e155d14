"""Records and the files that they are read from, and one clear line for each mistake."""

import json
from pathlib import Path

import pytest

from recurrentgemma.training.corpus import find_files, read_documents
from recurrentgemma.training.documents import Completion, Conversation, Document
from recurrentgemma.training.record_forms import document_of
from recurrentgemma.training.sources import (
    Collected,
    RecordFile,
    TextFile,
    parse_record,
)

DATASET = Path(__file__).parents[1] / "golden" / "dataset"
TURNS = [("user", "Who?"), ("assistant", "I."), ("user", "Why?"), ("model", "So.")]


def messages(turns, field="content"):
    return [{"role": role, field: text} for role, text in turns]


def read(path, lines):
    path.write_bytes(b"".join(line.encode() + b"\n" for line in lines))
    return list(RecordFile(path.name, path).documents())


def test_the_forms_of_a_record(tmp_path):
    records = [
        {"text": "one\n"},
        {"prompt": "p ", "response": "r", "text": None},
        {"messages": messages(TURNS)},
        {"turns": messages([("system", "Be brief."), *TURNS[:2]], "text")},
        {"text": ""},
    ]
    text, completion, chat, system = read(
        tmp_path / "a.jsonl", map(json.dumps, records)
    )
    assert type(text) is Document and text.text == "one\n"
    assert type(completion) is Completion
    assert (completion.text, completion.prompt_characters) == ("p r", 2)
    assert type(chat) is Conversation
    assert chat.turns == (("Who?", "I."), ("Why?", "So."))
    assert isinstance(system, Conversation)
    assert system.turns == (("Be brief.\n\nWho?", "I."),)


def test_a_records_name_is_that_of_its_content():
    records = [{"text": "a"}, {"text": "b"}, {"prompt": "a", "response": "b"}]
    records.append({"prompt": "", "response": "ab"})
    names = [document_of(record).name for record in records]
    assert len(set(names)) == 4
    assert document_of({"text": "a"}).name == names[0]


def test_fields_without_a_meaning_are_left_out_by_name():
    record = {"text": "a", "id": 7, "meta": {"url": "x"}}
    assert document_of(record, ["id", "meta"]) == document_of({"text": "a"})
    assert document_of(record, ["*"]) == document_of({"text": "a"})
    with pytest.raises(ValueError, match="got meta, text; to leave meta out"):
        document_of(record, ["id"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "record: expected a JSON object, got ''"),
        ('{"text": "a"', 'expected a JSON object, got .{"text": "a".; Expecting'),
        ("[" * 100_000, "record: expected a JSON object"),
        ('["text"]', "record: expected a JSON object, got ['text']"),
        ("{}", "record: expected the fields text, or prompt and response, or"),
        ('{"content": "a"}', "got content; to leave content out, name it in ignored"),
        ('{"text": "a", "prompt": "b"}', "got prompt, text"),
        ('{"prompt": "a"}', "expected the fields .*, got prompt"),
        ('{"text": 3}', "text: expected a text, got 3"),
        (r'{"text": "\ud800"}', "text: expected a text that UTF-8 can encode"),
        ('{"prompt": "a", "response": ""}', "response: expected a text that is not"),
        ('{"messages": []}', "messages: expected a turn of the model"),
        ('{"messages": "a"}', "messages: expected a list of turns, got 'a'"),
        ('{"turns": ["a"]}', r"turns\[0\]: expected an object with a role"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path / "a.jsonl", ['{"text": "fine"}', line])
    assert str(error.value).startswith(f"data: {tmp_path / 'a.jsonl'}, line 2: ")
    assert "\n" not in str(error.value)
    assert error.match(message.replace("['text']", r"\['text'\]"))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (TURNS[:3], "messages: expected a turn of the model at the end, got none"),
        (TURNS[1:], r"messages\[0\].role: expected a turn of the user, got 'model'"),
        ([("system", "x"), TURNS[1]], r"messages\[1\].role: .* the user"),
        ([*TURNS[:2], TURNS[1]], r"messages\[2\].role: .* the user, got 'model'"),
        (
            [TURNS[0], ("tool", "x")],
            r"messages\[1\].role: expected one of user, assist",
        ),
        ([TURNS[0], ("model", "")], r"messages\[1\].content: expected a text that is"),
    ],
)
def test_turns_out_of_order_are_refused(turns, message):
    with pytest.raises(ValueError, match=message):
        document_of({"messages": messages(turns)})


def test_a_turn_with_other_fields_is_refused():
    turns = messages(TURNS)
    turns[1]["name"] = "x"
    with pytest.raises(ValueError, match=r"messages\[1\]: .* got content, name, role"):
        document_of({"messages": turns})
    assert document_of({"messages": turns}, ["name"])


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: expected UTF-8 .* at 10"):
        list(RecordFile("a.jsonl", path).documents())


@pytest.mark.parametrize(("name", "kind"), [("a", TextFile), ("a.jsonl", RecordFile)])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, name, kind):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    file = kind(name, tmp_path / name)
    with pytest.raises(ValueError, match=rf"^data: cannot read .*{name}: Permission"):
        list(file.documents())
    with pytest.raises(ValueError, match="cannot read .*: No such file"):
        file.signature()


def test_collections_are_read_by_their_indices():
    class Source:
        """As grain demands of a source."""

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return [{"text": "a"}, "b", b'{"prompt": "c", "response": "d"}'][index]

    source = Collected("mine", Source())
    assert [document.text for document in source.documents()] == ["a", "b", "cd"]
    assert source.signature() == Collected("x", Source()).signature()
    assert source.signature() != Collected("mine", ["a", "b"]).signature()
    with pytest.raises(ValueError, match="^data: mine, record 1: record: expected"):
        list(Collected("mine", ["a", 3]).documents())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "importlib.import_module", lambda name: __import__("no_" + name)
    )
    for suffix, package in [("arrow", "pyarrow"), ("array_record", "grain")]:
        file = RecordFile("a", tmp_path / f"a.{suffix}")
        with pytest.raises(ValueError, match=rf"{package} .* 'recurrentgemma\[data\]'"):
            list(file.documents())


def test_a_dataset_on_disk():
    """What `DatasetDict.save_to_disk` of datasets 5.2.0 wrote; needs the extra `data`."""
    pytest.importorskip("pyarrow")
    chats = [TURNS, TURNS[:2], TURNS[2:]]
    expected = [document_of({"messages": messages(chat)}) for chat in chats]
    assert [file.name for file in find_files(DATASET / "train")] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]
    assert read_documents(DATASET / "train") == expected
    assert read_documents(DATASET / "test") == expected[:1]
    with pytest.raises(ValueError, match="got train, test; give .*dataset/train"):
        read_documents(DATASET)


def test_arrow_and_parquet_files(tmp_path):
    """Needs the extra `data`."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"text": "a"}, {"text": "b"}]
    table = arrow.Table.from_pylist(records)
    with arrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    parquet.write_table(table, tmp_path / "b.parquet")
    assert [document.text for document in read_documents(tmp_path)] == [*"abab"]
    for name in ("a.arrow", "b.parquet"):
        (tmp_path / name).write_bytes(b"neither of them" * 10)
        with pytest.raises(ValueError, match=f"^data: .*{name}") as error:
            read_documents(tmp_path / name)
        assert "\n" not in str(error.value)
    table = arrow.table({"text": ["a", "b", "c"], "id": [None, None, 1]})
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet, row 2: .* to leave id out"):
        read_documents(tmp_path / "b.parquet")


def test_a_dataset_of_grain():
    """Needs the extra `data`."""
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source([{"body": "a"}, {"body": "b"}])
    records = dataset.map(lambda record: {"text": record["body"]})
    assert [d.text for d in Collected("mine", records).documents()] == ["a", "b"]


def test_array_records(tmp_path):
    """Needs the extra `data`."""
    module = pytest.importorskip("array_record.python.array_record_module")
    pytest.importorskip("grain")
    path = tmp_path / "a.array_record"
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in (b'{"text": "a"}', b'{"text": 3}'):
        writer.write(record)
    writer.close()
    documents = RecordFile("a", path).documents()
    assert next(documents).text == "a"
    with pytest.raises(ValueError, match="a.array_record, record 1: text: expected"):
        next(documents)


def test_an_object_is_a_record_itself():
    assert parse_record({"text": "a"}) == {"text": "a"}
