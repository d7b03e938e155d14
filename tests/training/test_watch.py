"""Records survive a torn line, TensorBoard gets the numbers, the plot is optional."""

import sys

import pytest

from recurrentgemma import plots
from recurrentgemma.training.records import JsonLines, TensorBoard, read_rows
from recurrentgemma.training.watch import Watch, WatchConfig
from tests.models import random_model, tiny_config

ROWS = [
    {"step": 1, "loss": 3.0, "held_out_loss_by_position": {"0": 4.0, "1": 2.5}},
    {"step": 2, "loss": 2.0, "held_out_loss": 2.5, "held_out_loss_by_position": {}},
]


def watch(folder, config=WatchConfig(), first_step=0):  # noqa: B008
    return Watch(
        folder,
        config,
        first_step=first_step,
        steps=2,
        tokens_per_step=64,
        flops_per_step=1e9,
        peak_flops_per_s=1e10,
    )


def test_rows_that_are_done_again_go_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("nan") if step == 2 else 0.5})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a process was killed here
    assert len(path.read_text().splitlines()) == 4
    JsonLines(path, 9).close()
    assert [row["loss"] for row in read_rows(path)] == [0.5, None, 0.5]
    log = JsonLines(path, 1)
    log.write({"step": 2})
    log.close()
    assert read_rows(path) == [{"step": 1, "loss": 0.5}, {"step": 2}]


def test_a_full_disk_names_the_file(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    log.close()
    log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match=r"could not write to .*metrics.jsonl: No space"):
        log.write({"step": 1})
    log.close()


def test_the_plot_needs_matplotlib(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for row in ROWS:
        with watch(tmp_path, first_step=row["step"] - 1) as watched:
            watched.step(row, seconds=0.5)
    figure = plots.losses(read_rows(tmp_path / "metrics.jsonl"))
    left, right = figure.axes
    curves = [line.get_xydata().tolist() for line in left.lines]
    assert curves == [[[1, 3.0], [2, 2.0]], [[2, 2.5]]]
    assert not right.lines or not len(right.lines[0].get_xdata())
    assert read_rows(tmp_path / "metrics.jsonl")[0]["share_of_peak"] == 0.2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with watch(tmp_path, first_step=2) as watched:
        watched.plot()
    said = capsys.readouterr().out
    assert "no loss.png: matplotlib: expected" in said and said.count("\n") == 1
    assert not (tmp_path / "loss.png").exists()


def test_memory_lengths_are_counted(tmp_path):
    model = random_model(tiny_config())
    with watch(tmp_path) as watched:
        found = watched.memories(model, 1)["memory_tokens_histogram"]
    lengths = plots.memory_lengths(plots.slowest_decays(model)[1])
    assert sum(found["blocks.1"].values()) == len(lengths)
    for least, count in found["blocks.1"].items():
        inside = (lengths >= int(least)) & (lengths < 2 * int(least))
        assert count == inside.sum() + (least == "1") * (lengths < 1).sum()


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    config = WatchConfig(tensorboard=True)
    with watch(tmp_path, config) as watched:
        watched.memories(random_model(tiny_config()), 1)
        watched.step(ROWS[0], seconds=0.5)
    [file] = (tmp_path / "tensorboard").iterdir()
    tags = {
        value.tag: value.simple_value
        for event in _events(file.read_bytes(), Event)
        for value in event.summary.value
    }
    assert tags["loss"] == 3.0 and tags["held_out_loss_by_position/1"] == 2.5
    assert {"log2_memory_tokens/blocks.0", "train_tokens_per_s"} < tags.keys()


def _events(data, kind):
    """The records of a file of TensorBoard: length (8 bytes), checksum (4), event,
    checksum (4)."""
    place = 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 8], "little")
        yield kind.FromString(data[place + 12 : place + 12 + size])
        place += size + 16


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        ValueError, match=r"pip install 'recurrentgemma\[tensorboard\]'"
    ):
        TensorBoard(tmp_path, 0)
