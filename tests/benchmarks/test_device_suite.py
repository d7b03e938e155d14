"""The device suite rehearsed on a CPU: what goes well, and every way to fail."""

import dataclasses
import importlib
import json
import os
import re
from functools import partial

import jax
import numpy as np
import pytest

from recurrentgemma import cli
from recurrentgemma.benchmarks import device, device_suite
from recurrentgemma.benchmarks.device_suite import checks
from recurrentgemma.benchmarks.device_suite.cases import CASES
from recurrentgemma.benchmarks.device_suite.pieces import (
    DEFAULT,
    DONE,
    NOT_HERE,
    OUT_OF_MEMORY,
    RIGHT,
    TIME_LIMIT,
    WRONG,
    Piece,
    Wrong,
    failure,
)
from recurrentgemma.benchmarks.device_suite.sizes import SIZES
from recurrentgemma.benchmarks.device_suite.verdicts import markdown, verdicts
from recurrentgemma.benchmarks.device_suite.worker import Worker, WorkerError
from recurrentgemma.kernels import dispatch
from recurrentgemma.kernels.linear_scan import LINEAR_SCAN
from tests.benchmarks import device_pieces, ending_pieces

SETTINGS = {"size": "small", "seconds": 600.0, "only": [""]}


class InThisProcess:
    """A worker without a process."""

    def __init__(self, make, log):
        self.facts, self._pieces = make()
        self.pieces = [(piece.key, piece.limit_s) for piece in self._pieces]

    def run(self, index, limit_s):
        return self._pieces[index].run()[0]

    def close(self):
        pass


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(device_suite, "Worker", InThisProcess)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of two runs, the second one in a process that ends three times."""
    folder = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_suite, "Worker", InThisProcess)
        patch.setattr(device, "CPU_COPY_BYTES", (2**12,))
        device_suite.run(SETTINGS, folder, device_pieces.make)
    device_suite.run(SETTINGS, folder, ending_pieces.make)
    return folder


@pytest.fixture(scope="module")
def document(folder):
    return json.loads((folder / "device.json").read_text())


@pytest.fixture(scope="module")
def rows(document):
    """Rows by program and implementation."""
    return {(row["program"], row["implementation"]): row for row in document["rows"]}


def test_what_is_right(rows):
    for program, name in [
        ("linear_scan: sequence", DEFAULT),
        ("linear_scan: sequence", "chunked"),
        ("linear_scan: sequence", "pallas_gpu"),
        ("linear_scan: larger than 4 GiB", DEFAULT),
    ]:
        row = rows[program, name]
        assert row["status"] == RIGHT, row
        assert 0 <= row["error"] < checks.TOLERANCES["float32"]
    compared = rows["linear_scan: sequence", DEFAULT]["errors"].keys()
    gradients = {f"gradient of {name}" for name in ("x", "a", "h0")}
    assert compared == {"y", "h_last", *gradients}
    assert rows["linear_scan: larger than 4 GiB", DEFAULT]["bytes"] > 1 << 16


@pytest.mark.parametrize(
    ("program", "status", "message"),
    [
        (
            "off by a thousandth",
            WRONG,
            "y: relative RMS error of a channel up to 0.001",
        ),
        ("not finite", WRONG, "error of a channel up to nan"),
        ("two runs differ", WRONG, "y: two runs differ in their bits"),
        ("a kernel that does not compile", "FAILED", "ValueError: Only interpret mode"),
        ("out of memory", OUT_OF_MEMORY, "RESOURCE_EXHAUSTED: .*70368744177664"),
        ("a crash", "CRASHED", f"SIGABRT\n{ending_pieces.LAST_WORDS}"),
        ("no end", TIME_LIMIT, "the process took more than 1 s"),
    ],
)
def test_a_failure_is_a_row_that_says_why(rows, program, status, message):
    row = rows[program, DEFAULT]
    assert row["status"] == status
    assert row["remark"] and "\n" not in row["remark"]
    assert re.search(message, row["message"])


def test_what_comes_after_a_failure_runs_in_another_process(rows):
    names = ("after out of memory", "after a crash")
    processes = {rows[name, DEFAULT]["process"] for name in names}
    assert len(processes - {os.getpid()}) == 2


def test_what_an_implementation_does_not_take_says_so(rows):
    row = rows["linear_scan: sequence", "one_step"]
    assert (row["status"], row["remark"]) == (NOT_HERE, "it takes one step, not 11")


def test_times_and_verdict(document, rows):
    program = "linear_scan: training 2x24x256"
    row = rows[program, DEFAULT]
    assert row["status"] == DONE and row["chosen"] == "sequential"
    assert row["bytes_per_s"] == pytest.approx(
        1e3 * row["least_bytes"] / row["measured_ms"]
    )
    [verdict] = document["verdicts"]
    copies = rows["copy", DEFAULT]["bytes_per_s"]
    assert verdict["bandwidth_share"] == pytest.approx(row["bytes_per_s"] / copies)
    assert (verdict["program"], verdict["fastest"]) == (program, "chunked")
    assert verdict["verdict"] in ("keep", "change")


def test_the_page(folder, document):
    page = (folder / "device.md").read_text()
    assert "| linear_scan: training 2x24x256 | float32 | sequential |" in page
    assert (
        "- check a crash: default, float32: CRASHED, the process ended with SIG" in page
    )
    assert "Checks: 6 right, 1 not here, 3 WRONG, 1 FAILED, 1 out of memory" in page
    assert document["left"] == 0


def passing(*names, calls=None):
    """Facts, and pieces that take no time."""

    def work(name):
        if calls is not None:
            calls.append(name)
        return {"error": 0.0}

    pieces = [
        Piece("check", name, DEFAULT, "float32", partial(work, name)) for name in names
    ]
    return lambda: (ending_pieces.FACTS, pieces)


def test_finished_pieces_are_kept(tmp_path, in_this_process, capsys):
    calls = []
    make = passing("one", "two", "three", calls=calls)
    device_suite.run(SETTINGS | {"only": ["check t"]}, tmp_path, make)
    assert calls == ["two", "three"]
    first = json.loads((tmp_path / "device.json").read_text())["rows"]
    device_suite.run(SETTINGS, tmp_path, make)
    assert calls == ["two", "three", "one"]
    document = json.loads((tmp_path / "device.json").read_text())
    assert document["rows"][:2] == first and document["left"] == 0
    with pytest.raises(ValueError, match="--only: expected .* 'check one .* got four"):
        device_suite.run(SETTINGS | {"only": ["four"]}, tmp_path, make)


def test_a_budget_is_kept(tmp_path, in_this_process):
    device_suite.run(SETTINGS | {"seconds": 0.0}, tmp_path, passing("one", "two"))
    document = json.loads((tmp_path / "device.json").read_text())
    assert document["rows"] == [] and document["left"] == 2
    assert "2 pieces are left" in (tmp_path / "device.md").read_text()


def test_a_piece_that_the_budget_ends_is_no_failure(tmp_path, in_this_process):
    facts, pieces = passing("one", "two")()

    ended = partial(failure, TIME_LIMIT, "the process took more than 1 s")
    pieces[1] = dataclasses.replace(pieces[1], work=ended, limit_s=900.0)
    device_suite.run(SETTINGS, tmp_path, lambda: (facts, pieces))
    document = json.loads((tmp_path / "device.json").read_text())
    assert [row["program"] for row in document["rows"]] == ["one"]
    assert document["left"] == 1


@pytest.mark.parametrize(
    ("name", "value"), [("device", "Another"), ("commit", "abd"), ("versions", {})]
)
def test_other_conditions_are_refused(tmp_path, in_this_process, name, value):
    device_suite.run(SETTINGS, tmp_path, passing("one"))
    facts, pieces = passing("one")()
    with pytest.raises(
        ValueError, match=f"expected results with {name} .*; name anoth"
    ):
        device_suite.run(SETTINGS, tmp_path, lambda: (facts | {name: value}, pieces))


@pytest.mark.parametrize(
    ("platform", "name"), [("cpu", "sequential"), ("tpu", "pallas_tpu")]
)
def test_the_name_of_a_default(platform, name):
    def scan(x, h0):
        names.append(dispatch.chosen(LINEAR_SCAN, platform, x, x, h0, reverse=False))

    names, array = [], partial(jax.ShapeDtypeStruct, dtype="float32")
    jax.eval_shape(scan, array((2, 7, 5)), array((2, 5)))
    assert names == [name]


def test_full_sizes_are_not_for_a_cpu(tmp_path, in_this_process):
    with pytest.raises(
        ValueError, match="--size: expected a GPU or a TPU for full, got"
    ):
        device_suite.run(SETTINGS | {"size": "full"}, tmp_path, passing("one"))


def timed(name, ms, status=DONE, **figures):
    key = {"kind": "time", "program": "scan: long", "dtype": "float32"}
    row = key | {"implementation": name, "status": status, "remark": "why"} | figures
    if status != DONE:
        return row
    return row | {
        "check": "scan",
        "chosen": "plain",
        "measured_ms": ms,
        "bytes_per_s": 1,
    }


def checked(name, status):
    key = {"kind": "check", "program": "scan: case", "dtype": "float32"}
    return key | {"implementation": name, "status": status, "remark": "why"}


RIGHT_DEFAULT = [checked(DEFAULT, RIGHT), checked(DEFAULT, NOT_HERE)]


@pytest.mark.parametrize(
    ("rows", "verdict", "reason"),
    [
        (
            [*RIGHT_DEFAULT, timed("fast", 1.0)],
            "keep",
            "nothing else is right and timed",
        ),
        (
            [*RIGHT_DEFAULT, checked("fast", RIGHT), timed("fast", 1.0)],
            "change",
            "fast is 2.00 times as fast",
        ),
        (
            [*RIGHT_DEFAULT, checked("fast", RIGHT), timed("fast", 1.95)],
            "keep",
            "nothing is faster",
        ),
        (
            [*RIGHT_DEFAULT, checked("plain", RIGHT), timed("plain", 1.0)],
            "keep",
            "nothing is faster",
        ),
        (
            [*RIGHT_DEFAULT, checked("fast", WRONG), timed("fast", 1.0)],
            "keep",
            "nothing else is right and timed",
        ),
        (
            [checked(DEFAULT, WRONG), checked("slow", RIGHT), timed("slow", 3.0)],
            "change",
            "the default is wrong",
        ),
        ([], "unknown", "the default was not checked"),
    ],
)
def test_verdicts(rows, verdict, reason):
    [found] = verdicts([timed(DEFAULT, 2.0), *rows])
    assert (found["verdict"], found["reason"]) == (verdict, reason)


def test_a_default_without_a_time():
    rows = [timed(DEFAULT, 0, OUT_OF_MEMORY), *RIGHT_DEFAULT]
    [found] = verdicts(rows)
    assert found["verdict"] == "unknown" and "out of memory" in found["reason"]
    [found] = verdicts([*rows, checked("fast", RIGHT), timed("fast", 1.0)])
    assert (found["verdict"], found["fastest"]) == ("change", "fast")
    facts = {"device": "A", "versions": {}, "commit": "c", "size": "full"}
    page = markdown(facts, rows, [found], 0)
    assert "| scan: long | float32 | - | - | - | fast | 1 | change: the default" in page


def test_errors_are_those_of_a_channel():
    expected = np.ones((4, 8, 3)) * [1.0, 1.0, 1e-3]
    actual = expected + np.float64([0, 0, 1e-5])
    assert checks.relative_error(actual, expected) == pytest.approx(1e-2)
    assert checks.relative_error(actual[0, 0], expected[0, 0]) < 1e-4  # few entries
    assert checks.relative_error(expected, expected) == 0
    actual[0, 0, 0] = np.nan
    assert np.isnan(checks.relative_error(actual, expected))
    integers = np.arange(6).reshape(2, 3)
    assert checks.relative_error(integers, integers) == 0
    assert checks.relative_error(integers, integers + 1) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("rg_lru: gates", "rg_lru.gates"),
        ("local_attention: documents", "local_attention.blocked"),
    ],
)
def test_products_of_fewer_digits_are_found(program, module, monkeypatch):
    """As TensorFloat-32 would multiply float32 operands: ten bits behind the comma."""
    case = next(case for case in CASES if case.program == program)
    size = SIZES["small"]
    assert checks.check(case, DEFAULT, "float32", size)["error"] < 1e-5
    module = importlib.import_module(f"recurrentgemma.kernels.{module}")
    exact = module.einsum_float32

    def rounded(spec, *operands):
        return exact(spec, *(jax.lax.reduce_precision(x, 8, 10) for x in operands))

    monkeypatch.setattr(module, "einsum_float32", rounded)
    with pytest.raises(Wrong) as caught:
        checks.check(case, DEFAULT, "float32", size)
    assert caught.value.row["error"] > 5 * checks.TOLERANCES["float32"]


@pytest.mark.slow
def test_a_device_that_does_not_start(tmp_path):
    with pytest.raises(
        WorkerError, match="ended with status 1\\n(.|\\n)*no driver was f"
    ):
        Worker(ending_pieces.no_device, tmp_path / "log")


def test_the_whole_suite(tmp_path, capsys):
    """The command itself: every piece in the small size."""
    command = ["bench", "device", "--size=small", f"--out={tmp_path}"]
    assert cli.main([*command, "--seconds=3000"]) == 0
    document = json.loads((tmp_path / "device.json").read_text())
    assert document["left"] == 0 and document["truth"] == "cpu"
    assert {"device", "versions", "commit", "memory_bytes"} <= document.keys()
    bad = [r for r in document["rows"] if r["status"] not in (RIGHT, DONE, NOT_HERE)]
    assert bad == []
    models = {r["program"] for r in document["rows"] if r["kind"] == "model"}
    assert models == {
        f"griffin-175k: {what}"
        for what in ("prefill 24", "decode 1", "decode 2", "train step")
    }
    found = document["verdicts"]
    assert all(row["verdict"] in ("keep", "change") for row in found)
    ops = {row["program"].split(":")[0] for row in found}
    assert {"linear_scan", "rg_lru_with_gates", "local_attention"} <= ops
