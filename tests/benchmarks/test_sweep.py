"""Grids of points: cards, resuming, memory, and what is refused; on tiny models."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from recurrentgemma import Runtime, Sampler, Sampling, cli, cost
from recurrentgemma.benchmarks import (
    compare,
    device,
    long_gradients,
    memory,
    models,
    picture,
    start,
    sweep,
    throughput,
)
from recurrentgemma.benchmarks.report import Column
from tests.models import tiny_config

GRIFFIN = tiny_config(block_pattern=("recurrent", "local_attention"), num_layers=2)
TRANSFORMER = tiny_config(block_pattern=("global_attention",), num_layers=1)
TINY = {"griffin": GRIFFIN, "transformer": TRANSFORMER}
FIGURES = Column("tokens/s", "tokens_per_s", 10), Column("peak", "peak_bytes", 10)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(models, "SMALL_PRESETS", TINY)
    monkeypatch.setattr(device, "SAMPLE_S", 1e-4)
    monkeypatch.setattr(device, "SAMPLES", 2)
    monkeypatch.setattr(device, "WORKING_SET_BYTES", 1 << 12)
    monkeypatch.setattr(device, "CPU_COPY_BYTES", (2**12,))


def assert_drawn(path):
    """A picture, where there is something to draw with."""
    if importlib.util.find_spec("matplotlib"):
        assert path.read_bytes().startswith(b"\x89PNG")


def bench(folder, question, *arguments):
    """The document of a run."""
    command = ["bench", question, f"--out={folder}", "--repeats=2", *arguments]
    assert cli.main(command) == 0
    return json.loads((folder / f"{question}.json").read_text())


def fails(capsys, folder, *arguments):
    """What standard error says of a run that is refused."""
    assert cli.main(["bench", *arguments, f"--out={folder}"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_decode(tmp_path, capsys, monkeypatch):
    lengths = "--lengths=16,64", "--read-up-to=16", "--batch=1"
    document = bench(tmp_path, "decode", *lengths)
    rows = {(row["preset"], row["length"]): row for row in document["rows"]}
    assert rows.keys() == {(name, length) for name in TINY for length in (16, 64)}
    rates = document["cards"]["griffin, float32"]["rates"]
    for (name, length), row in rows.items():
        assert row["batch"] == 1 and row["synthetic"] == (length > 16)
        sizes = {"dtype": "float32", "capacity": length}
        assert row["cache_bytes"] == cost.cache_bytes(TINY[name], **sizes)
        assert len(row["samples_s"]) == 2
        assert row["tokens_per_s"] == pytest.approx(64 / np.median(row["samples_s"]))
        assert row["compile_s"] > 0 and row["peak_bytes"] > 0
    row = rows["griffin", 16]
    limit = rates["read_1_rows_bytes_per_s"] / cost.decode_bytes(GRIFFIN, dtype="f4")
    assert row["share_of_ceiling"] == pytest.approx(row["tokens_per_s"] / limit)
    assert {"versions", "commit", "device", "copies"} <= document.keys()
    assert_drawn(tmp_path / "decode.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{device.name()}: ")
    assert f"{cost.num_parameters(GRIFFIN):,} parameters" in lines[1]
    table = next(i for i, line in enumerate(lines) if line.startswith("preset"))
    assert table == 5 and len(lines) == 6 + len(rows)

    # The second run measures nothing, and shows all rows.
    monkeypatch.setattr(sweep, "Subject", None)
    monkeypatch.setattr(device, "rates", None)
    monkeypatch.setattr(device, "copy_bytes_per_s", None)
    assert bench(tmp_path, "decode", *lengths)["rows"] == document["rows"]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.fixture(scope="module")
def mixed():
    """A model of all kinds of layers, and its programs for two rows."""
    kinds = ("recurrent", "local_attention", "global_attention")
    config = tiny_config(block_pattern=kinds, num_layers=3)
    subject = models.Subject(config, "float32", 10**9)
    return subject.model, subject.programs(2, 28)


def test_the_measured_programs_write_what_the_sampler_writes(mixed):
    model, programs = mixed
    tokens = models.random_tokens(model.config, 2, 20)
    state = programs.start(programs.read(programs.new_cache(), tokens))
    state = programs.write(state, 8)
    assert set(programs._compiled) == {"read 16", "write"}
    sampler = Sampler(model, compile_ahead=False)
    prompts = [[*row, 0] for row in tokens.tolist()]  # a new state feeds token 0
    options = {"max_new_tokens": 8, "sampling": Sampling(temperature=0)}
    samples = sampler(prompts, end_tokens=[], **options)
    written = np.asarray(state.history.last_token).tolist()
    assert [sample.tokens[-1] for sample in samples] == written


def assert_similar(one, other):
    """The same shapes and positions; other values."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype == "int32":
            np.testing.assert_array_equal(a, b)
        else:
            assert np.all(np.isfinite(b)) and np.any(b)


def test_a_filled_cache_is_like_one_that_was_read(mixed):
    model, programs = mixed
    tokens = models.random_tokens(model.config, 2, 17)
    read = programs.read(programs.new_cache(), tokens)
    assert_similar(read, programs.synthetic_cache(17))


def test_a_rewound_cache_has_its_room_again(mixed):
    """Local layers alone keep what is newer, which their queries do not see."""
    _, programs = mixed
    state = programs.start(programs.synthetic_cache(28))
    [rewound] = programs.rewind(state, 20).caches
    expected = programs.synthetic_cache(20)
    np.testing.assert_array_equal(rewound.next_position, expected.next_position)
    assert_similar(rewound.layers[2], expected.layers[2])
    assert_similar(rewound.layers[1], programs.synthetic_cache(28).layers[1])


def test_a_program_that_does_not_fit_is_not_run(mixed):
    model, programs = mixed
    programs.compile_for(16)
    needed = programs.needed_bytes
    least = cost.decode_bytes(model.config, 2, dtype="float32", capacity=28)
    assert least < needed
    too_large = models.Programs(model, 2, 28, needed - 1)
    for _ in range(2):  # also where it has been compiled before
        with pytest.raises(models.OutOfMemory) as caught:
            too_large.compile_for(16)
        assert caught.value.needed_bytes == needed
    models.Programs(model, 2, 28, needed).compile_for(16)


def test_throughput_takes_the_best_that_fits(tmp_path, capsys):
    arguments = ("--preset=transformer", "--lengths=16", "--batch=1,100k")
    document = bench(tmp_path, "throughput", *arguments, "--memory=0.02")
    fitting, last = document["rows"]
    assert last["out_of_memory"] and last["needed_bytes"] > 0.02e9
    assert last["remark"].startswith("out of memory: needs ")
    assert "tokens_per_s" not in last
    assert document["best"] == [fitting]
    assert "tokens/s at batch 1\n" in capsys.readouterr().out


def test_the_front_of_throughput():
    rows = [
        {"preset": "a", "dtype": "f4", "batch": batch, "length": length}
        | {"tokens_per_s": rate, "samples_s": []}
        for batch, length, rate in ((1, 8, 10.0), (4, 8, 30.0), (8, 8, 20.0))
    ]
    rows.append(rows[0] | {"batch": 16, "tokens_per_s": None, "out_of_memory": True})
    best, front = throughput.panels(rows)
    assert best.lines == {"a": [(8, 30.0, False)]}
    assert [p[:2] for p in front.lines["a"]] == [(10, 10), (7.5, 30), (2.5, 20)]


def test_prefill(tmp_path):
    [row] = bench(tmp_path, "prefill", "--preset=griffin", "--lengths=20")["rows"]
    assert row["first_token_s"] > min(row["samples_s"])
    assert row["kept_prefix_first_token_s"] > 0
    assert len(row["kept_prefix_samples_s"]) == 2
    assert row["tokens_per_s"] == pytest.approx(20 / np.median(row["samples_s"]))


def test_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "longest_text", lambda *_: 7)
    [row] = bench(tmp_path, "memory", "--preset=transformer", "--lengths=16")["rows"]
    sizes = {"dtype": "float32", "capacity": 16}
    assert row["cache_bytes"] == cost.cache_bytes(TRANSFORMER, **sizes)
    assert row["needed_bytes"] > row["parameter_bytes"] + row["cache_bytes"]
    assert row["longest"] == 7


@pytest.mark.slow
def test_the_longest_text_fills_the_memory():
    runtime = Runtime(compute_dtype="float32")
    assert memory.longest_text(GRIFFIN, runtime, 1, 20_000_000) == "any"
    assert memory.longest_text(TRANSFORMER, runtime, 1, 2_000_000) == 0
    # Below a ring's length from which on it is read in place, and above it.
    assert 512 < memory.longest_text(TRANSFORMER, runtime, 1, 20_000_000) < 1024
    longest = memory.longest_text(TRANSFORMER, runtime, 1, 30_000_000)
    model = models.random_model(TRANSFORMER, runtime)
    programs = models.Programs(model, 1, longest + 64, 10**9)
    programs.compile_for(1024)
    assert programs.needed_bytes == pytest.approx(3e7, rel=0.03)


def test_train(tmp_path):
    [row] = bench(tmp_path, "train", "--preset=transformer", "--lengths=8")["rows"]
    assert len(row["samples_s"]) == 2 and row["share_of_ceiling"] > 0
    state = 4 * 3 * cost.num_parameters(TRANSFORMER)
    assert row["needed_bytes"] > state


LONG = ["--preset=griffin", "--dtype=float32", "--chunk=4", "--keep-every=2"]
LONG += ["--whole=8"]


def test_long_gradients(tmp_path):
    rows = bench(tmp_path, "long_gradients", "--lengths=8,24", *LONG)["rows"]
    assert [row["length"] for row in rows] == [8, 24]
    assert rows[0]["difference"] < 1e-5 and "difference" not in rows[1]
    cache = cost.cache_bytes(GRIFFIN, dtype="float32")
    assert [row["boundary_bytes"] for row in rows] == [2 * cache, 4 * cache]
    document = json.loads((tmp_path / "long_gradients.json").read_text())
    ratios = document["ratios"]["griffin"]
    expected = rows[0]["whole_tokens_per_s"] / rows[1]["tokens_per_s"]
    assert ratios["time_over_whole"] == pytest.approx(expected)
    assert_drawn(tmp_path / "long_gradients.png")


@pytest.mark.slow
def test_long_gradients_agree_before_they_are_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(long_gradients, "LARGEST_DIFFERENCE", 0.0)
    command = ["bench", "long_gradients", f"--out={tmp_path}", "--lengths=7"]
    assert cli.main([*command, *LONG]) == 1
    assert "gradients of 7 tokens: " in capsys.readouterr().err


@pytest.mark.slow
def test_start(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "MODES", ("empty_cache",))
    monkeypatch.setattr(start, "panels", lambda rows: [])
    flags = "--preset=transformer", "--repeats=1"
    [row] = bench(tmp_path, "start", *flags)["rows"]
    [[imported, made, first]] = row["samples_s"]["empty_cache"]
    assert row["empty_cache_s"] == pytest.approx(imported + made + first)
    assert row["import_s"] == imported > 0 and first > 0


def fake(measure, **fields):
    """A sweep that compiles nothing."""
    return sweep.Sweep("fake", measure, columns=FIGURES, **fields)


def run_fake(folder, measure, **changed):
    values = {"preset": ["griffin"], "batch": ["1"], "lengths": ["8", "16"]}
    values |= {"dtype": None, "repeats": 1, "memory": 1.0} | changed
    fake(measure).run(values, folder)
    return json.loads((folder / "fake.json").read_text())["rows"]


def test_an_interrupted_sweep_goes_on(tmp_path):
    measured = []

    def measure(subject, point, values):
        if len(measured) == 1 and point.length == 16:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(point.length)
        return sweep.speed([0.5], point.length, None)

    with pytest.raises(KeyboardInterrupt):
        run_fake(tmp_path, measure)
    rows = run_fake(tmp_path, measure)
    assert measured == [8, None, 16]
    assert [row["tokens_per_s"] for row in rows] == [16, 32]
    assert len(run_fake(tmp_path, measure, lengths=["32"])) == 3
    assert measured[3:] == [32]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9"),
    ],
)
def test_running_out_of_memory_is_a_row(tmp_path, error):
    def measure(subject, point, values):
        if point.length == 16:
            raise error
        return sweep.speed([1.0], 8, None)

    first, second = run_fake(tmp_path, measure)
    assert first["tokens_per_s"] == 8
    assert second["out_of_memory"] and "tokens_per_s" not in second
    assert_drawn(tmp_path / "fake.png")


def test_other_errors_are_no_rows(tmp_path):
    def measure(subject, point, values):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"):
        run_fake(tmp_path, measure)


def test_a_model_that_does_not_fit_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "random_model", None)
    document = bench(tmp_path, "decode", "--preset=griffin", "--memory=1e-6")
    assert all(row["out_of_memory"] for row in document["rows"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--lengths=0", "--lengths: expected numbers from 1 to 100,000,000"),
        ("--lengths=1G", "such as 512,4k,1M, got '1G'"),
        ("--lengths=200M", "got '200M'"),
        ("--lengths=", "--lengths: expected at least one number, got none"),
        ("--batch=-1", "--batch: expected numbers from 1"),
        ("--read-up-to=x", "--read-up-to: expected numbers from 1"),
        ("--preset=grifin", "--preset: expected a name such as griffin"),
        ("--memory=-1", "memory: expected "),
        ("--dtype=int8", "dtype: expected "),
    ],
)
def test_what_means_nothing_is_refused(tmp_path, capsys, flag, message):
    assert message in fails(capsys, tmp_path, "decode", flag)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a result of `recurrentgemma bench`, got no JSON"),
        ("[]", "expected a result of `recurrentgemma bench`, got other JSON"),
        ('{"rows": []}', "expected results with benchmark decode, got None"),
    ],
)
def test_a_file_that_is_no_result_stays(tmp_path, capsys, text, message):
    path = tmp_path / "decode.json"
    path.write_text(text)
    assert message in fails(capsys, tmp_path, "decode", "--preset=griffin")
    assert path.read_text() == text


def test_results_of_another_memory_are_not_mixed(tmp_path, capsys):
    bench(tmp_path, "decode", "--preset=griffin", "--memory=1e-6")
    capsys.readouterr()
    message = fails(capsys, tmp_path, "decode", "--memory=1")
    assert "expected results with memory_bytes 1000000000, got 1000" in message


@pytest.mark.parametrize(
    ("table", "least"), [("SMALL_PRESETS", 1e8), ("MINIATURES", 6.8e6)]
)
def test_small_presets_have_as_many_parameters(table, least, monkeypatch):
    monkeypatch.undo()
    configs = getattr(models, table)
    counts = [cost.num_parameters(config) for config in configs.values()]
    assert len(counts) == 3 and least < min(counts)
    assert max(counts) < 1.005 * min(counts)
    assert all(models.find(name) == config for name, config in configs.items())


def test_a_notebook_runs_a_sweep_as_the_command_does(tmp_path, capsys):
    chosen = {"preset": ["griffin"], "lengths": ["16"], "batch": ["1"], "repeats": 2}
    sweep = importlib.import_module("recurrentgemma.benchmarks.decode").SWEEP
    sweep.run(sweep.settings(**chosen), tmp_path)
    [row] = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert (row["preset"], row["length"], len(row["samples_s"])) == ("griffin", 16, 2)
    with pytest.raises(ValueError, match="settings: expected one of .*, got 'widths'"):
        sweep.settings(widths=3)


def document_of(path, speeds):
    rows = [
        {"preset": preset, "dtype": "float32", "batch": 1, "length": int(length)}
        | {"tokens_per_s": speed}
        for preset, by_length in speeds.items()
        for length, speed in by_length.items()
    ]
    path.write_text(json.dumps({"benchmark": "decode", "device": "x", "rows": rows}))
    return str(path)


def test_compare_names_the_crossover(tmp_path):
    flat, falling = {1024: 10, 4096: 10, 8192: 10}, {1024: 20, 4096: 5, 8192: 5}
    document = document_of(tmp_path / "a.json", {"flat": flat, "falling": falling})
    assert cli.main(["bench", "compare", document, f"--out={tmp_path}"]) == 0
    [row] = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert (row["name"], row["other"]) == ("flat", "falling")
    assert (row["ratio_at_shortest"], row["ratio_at_longest"]) == (0.5, 2)
    assert row["crossover"] == pytest.approx(2048)
    assert_drawn(tmp_path / "compare.png")
    assert compare.crossover({1: 2.0, 2: 3.0}) == "none"

    other = document_of(tmp_path / "b.json", {"flat": {1024: 40, 8192: 40}})
    assert cli.main(["bench", "compare", document, other, f"--out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [row["crossover"] for row in rows] == [pytest.approx(2048), "none", "none"]
    assert rows[1]["other"] == "b: flat" and rows[1]["ratios"]["8192"] == 0.25


def test_compare_refuses_what_has_no_speeds(tmp_path, capsys):
    assert "got none" in fails(capsys, tmp_path, "compare")
    assert "No such file" in fails(capsys, tmp_path, "compare", str(tmp_path / "a"))
    path = tmp_path / "scan.json"
    path.write_text(json.dumps({"rows": [{"program": "rg_lru: composed"}]}))
    assert "one without 'batch'" in fails(capsys, tmp_path, "compare", str(path))


def test_pictures_need_matplotlib(tmp_path, capsys, monkeypatch):
    panel = picture.Panel("tokens", "tokens/s", {"a": [picture.Point(1, 2.0)]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    picture.draw(tmp_path / "a.png", "", [panel])
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "pip install 'recurrentgemma[plot]'" in message
    assert list(tmp_path.iterdir()) == []


def test_lines_are_named_by_what_differs():
    rows = [
        {"preset": "a", "dtype": "f4", "batch": batch, "length": n, "y": 1.0}
        for batch in (1, 8)
        for n in (4, 2)
    ]
    rows.append(rows[0] | {"y": None, "length": 8, "out_of_memory": True})
    lines = picture.lines_of(rows, "y")
    assert list(lines) == ["batch 1", "batch 8"]
    assert [(p.x, p.y) for p in lines["batch 1"]] == [(2, 1), (4, 1), (8, None)]
