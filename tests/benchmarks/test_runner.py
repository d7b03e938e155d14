"""One way to start, one table, one document; and ways of writing the same texts."""

import importlib
import json
from types import SimpleNamespace

import pytest

from recurrentgemma.benchmarks import runner
from recurrentgemma.benchmarks.paired import Disagreement, Way, compare_ways
from recurrentgemma.benchmarks.report import Column, Report


@pytest.mark.parametrize("name", runner.BENCHMARKS)
def test_every_benchmark_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        runner.main([name, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "--output" in text
    described = importlib.import_module(f"recurrentgemma.benchmarks.{name}").__doc__
    assert described.strip() in text


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

    again = Report(path, columns, resume=True)
    assert again.find({"name": "one"}) == row
    assert again.find({"name": "three"}) == {}
    again.add({"name": "one", "median": {"ours": 1}})
    rows = json.loads(path.read_text())["rows"]
    assert [row.get("median") for row in rows] == [{"ours": 1}, None]
    Report(path, columns).add({"name": "three"})
    assert len(json.loads(path.read_text())["rows"]) == 1


def write(*texts):
    return [SimpleNamespace(tokens=list(text)) for text in texts]


def test_ways_are_timed_only_if_they_write_the_same():
    calls = []

    def run(name, *texts):
        calls.append(name)
        return write(*texts)

    ours = Way("ours", lambda: run("ours", "ab", "cd"))
    same = Way("same", lambda: run("same", "ab", "cd"))
    row, samples = compare_ways("texts", [ours, same], rounds=2)
    assert [sample.tokens for sample in samples] == [["a", "b"], ["c", "d"]]
    assert calls == ["ours", "same", "ours", "same", "same", "ours"]
    assert [len(values) for values in row["samples"].values()] == [2, 2]

    calls.clear()
    other = Way("other", lambda: run("other", "ab", "ce"))
    with pytest.raises(Disagreement, match="texts: 1 of 2 texts differ between ours"):
        compare_ways("texts", [ours, other], rounds=2)
    assert calls == ["ours", "other"]
