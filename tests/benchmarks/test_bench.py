"""One way to start, one table, one document; and ways of writing the same texts."""

import importlib
import json
from types import SimpleNamespace

import pytest

from recurrentgemma import cli
from recurrentgemma.benchmarks.paired import Disagreement, Way, compare_ways
from recurrentgemma.benchmarks.report import Column, Report
from recurrentgemma.commands import bench


@pytest.mark.parametrize("name", bench.SUB_COMMANDS)
def test_every_question_explains_its_flags(name, capsys):
    assert cli.main(["bench", name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Usage: recurrentgemma bench {name} " in text and "--out" in text
    module = bench.MODULES.get(name, name)
    described = importlib.import_module(f"recurrentgemma.benchmarks.{module}").__doc__
    assert " ".join(described.split()) in text


def test_help_shows_a_list_as_it_is_given(capsys):
    assert cli.main(["bench", "decode", "--help"]) == 0
    assert "(default: 1,8)" in capsys.readouterr().out


def test_help_names_every_question(capsys):
    assert cli.main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in bench.SUB_COMMANDS)


def test_a_question_is_named(capsys):
    for arguments, found in ([], "none"), (["speed"], "speed"):
        assert cli.main(["bench", *arguments]) == cli.EXIT_USAGE
        message = capsys.readouterr().err
        assert f"got {found}" in message and all(
            q in message for q in bench.SUB_COMMANDS
        )


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", "train", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("recurrentgemma: bench train: --out: ")


def test_a_document_is_written_after_every_row(tmp_path, capsys):
    columns = [
        Column("", "name", 5),
        Column("ms", "median/ours", 8, 1e3),
        Column("x", "median/theirs", 2),
    ]
    path = tmp_path / "new" / "rows.json"
    report = Report(path, columns, steps=3)
    report.add({"name": "one", "median": {"ours": 0.01234567}, "remark": "odd"})
    first = json.loads(path.read_text())
    assert first["steps"] == 3
    assert {"device", "versions", "commit", "time"} <= first.keys()
    [row] = first["rows"]
    assert row["median"] == {"ours": 0.01234567}
    report.add({"name": "two"})
    assert len(json.loads(path.read_text())["rows"]) == 2
    assert capsys.readouterr().out.splitlines() == [
        "       ms        x",
        "one    12.35     -   odd",
        "two    -         -",
    ]


def write(*texts):
    return [SimpleNamespace(tokens=list(text)) for text in texts]


def test_ways_are_timed_only_if_they_write_the_same():
    calls = []

    def run(name, *texts):
        calls.append(name)
        return write(*texts)

    ours = Way("ours", lambda: run("ours", "ab", "cd"))
    same = Way("same", lambda: run("same", "ab", "cd"))
    row = compare_ways("texts", ours, same, rounds=2)
    assert calls == ["ours", "same", "ours", "same", "same", "ours"]
    assert [len(values) for values in row["samples"].values()] == [2, 2]

    calls.clear()
    other = Way("other", lambda: run("other", "ab", "ce"))
    with pytest.raises(Disagreement, match="texts: 1 of 2 texts differ between ours"):
        compare_ways("texts", ours, other, rounds=2)
    assert calls == ["ours", "other"]
