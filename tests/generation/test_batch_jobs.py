"""A job gives every prompt its text once, whatever interrupts it."""

import json
import os
import threading
import types
from pathlib import Path

import numpy as np
import pytest

from recurrentgemma.generation.batch_jobs import OUTPUT_FIELDS, BatchJob
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.tokenizer import Tokenizer
from tests.golden_models import load_golden

GOLDEN = Path(__file__).parents[1] / "golden" / "sampler"
COUNT = 9
SETTINGS = {"max_new_tokens": 12, "sampling": Sampling(0.9), "seed": 7}


class Quick(Sampler):
    """Texts without a model, two of a batch at a time, the later one first."""

    def iterate(self, prompts, *, seed, **_):
        rows = enumerate(zip(prompts, seed, strict=True))
        while pair := [row for row in (next(rows, None), next(rows, None)) if row]:
            for index, (prompt, one) in reversed(pair):
                yield (
                    index,
                    types.SimpleNamespace(
                        text=f"{prompt} é\n{one}",
                        tokens=[1, 2],
                        log_probs=np.full(2, -one, np.float32),
                        ended=True,
                    ),
                )


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(GOLDEN / "tokenizer.model")


@pytest.fixture(scope="module")
def model():
    return load_golden(GOLDEN)


@pytest.fixture(scope="module")
def quick(model, tokenizer):
    return Quick(model, tokenizer)


@pytest.fixture
def paths(tmp_path):
    """The input, and where the output is to be."""
    source = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"Boat {n} ☃", "tags": [n, None]} for n in range(COUNT)]
    _write(source, lines)
    return source, tmp_path / "deep" / "texts.jsonl"


def _write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read(path):
    """Records by line; no line twice."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    by_line = {record["line"]: record for record in records}
    assert len(by_line) == len(records)
    return by_line


def test_texts_are_those_of_the_prompts_alone(paths, model, tokenizer):
    """In refilled batches of any size."""
    sampler = Sampler(model, tokenizer, compile_ahead=False)
    stop = ["e "]
    job = BatchJob(*paths, stop=stop, **SETTINGS)
    assert job.num_prompts == COUNT
    assert job.run(sampler, batch_size=2) == COUNT
    records = _read(paths[1])
    assert sorted(records) == list(range(1, COUNT + 1))
    for number, record in records.items():
        prompt = f"Boat {number - 1} ☃"
        seed = SETTINGS["seed"] + number
        [alone] = sampler([prompt], stop=stop, **{**SETTINGS, "seed": seed})
        assert record["text"] == alone.text
        assert record["prompt"] == prompt and record["tags"] == [number - 1, None]
        assert record["num_tokens"] == len(alone.tokens)
        assert record["ended"] == alone.ended
        assert record["log_prob"] == pytest.approx(np.sum(alone.log_probs), rel=1e-4)
    assert {record["ended"] for record in records.values()} == {True, False}


def test_a_job_cut_off_anywhere_is_resumed(paths, quick):
    job = BatchJob(*paths, **SETTINGS)
    job.run(quick)
    target = paths[1]
    whole, records = target.read_bytes(), _read(target)
    assert [json.loads(line)["line"] for line in whole.splitlines()][:4] == [2, 1, 4, 3]
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    sizes = {*range(12), *range(0, len(whole), 31), *ends, *(end - 1 for end in ends)}
    for size in sorted(sizes):
        target.write_bytes(whole[:size])
        kept = whole[:size].count(b"\n")
        assert BatchJob(*paths, **SETTINGS).run(quick) == COUNT - kept
        assert _read(target) == records, size


def test_records_are_on_disk_as_soon_as_they_are_finished(paths, quick):
    seen = []

    def progress(done, total):
        lines = paths[1].read_bytes().count(b"\n") if paths[1].exists() else 0
        seen.append((done, total, lines))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BatchJob(*paths, **SETTINGS).run(quick, progress=progress)
    assert seen == [(n, COUNT, n) for n in range(6)]
    seen.clear()
    job = BatchJob(*paths, **SETTINGS)
    assert job.run(quick, progress=lambda *both: seen.append(both)) == COUNT - 5
    assert seen == [(n, COUNT) for n in range(5, COUNT + 1)]


def test_an_input_may_grow(paths, quick):
    source, target = paths
    BatchJob(*paths, **SETTINGS).run(quick)
    with source.open("a") as file:
        file.write('{"prompt": ""}')
    assert BatchJob(*paths, **SETTINGS).run(quick) == 1
    assert _read(target)[COUNT + 1]["text"] == f" é\n{SETTINGS['seed'] + COUNT + 1}"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"max_new_tokens": 13},
        {"sampling": Sampling(0.8)},
        {"sampling": Sampling(0.9, repetition_penalty=1)},
        {"stop": ["x"]},
    ],
    ids=str,
)
def test_an_output_of_other_settings_is_refused(paths, quick, change):
    BatchJob(*paths, **SETTINGS).run(quick)
    _refused(paths, quick, **change)


def test_an_output_of_another_input_or_model_is_refused(paths, quick, tokenizer):
    source, target = paths
    BatchJob(*paths, **SETTINGS).run(quick)
    lines = source.read_text()
    source.write_text(lines.replace("Boat 4", "Ship 4"))
    _refused(paths, quick)
    source.write_text("".join(lines.splitlines(keepends=True)[:-1]))
    _refused(paths, quick)
    source.write_text(lines)
    other = load_golden(GOLDEN)
    other.final_norm.scale[...] += 1
    _refused(paths, Quick(other, tokenizer))
    assert BatchJob(*paths, **SETTINGS).run(quick) == 0
    assert sorted(_read(target)) == list(range(1, COUNT + 1))


@pytest.mark.parametrize(
    "content", ["Mine", "Mine\n", '{"line": 1}\n', "[1]\n", '{"prompt": "a"}']
)
def test_any_other_output_is_refused(paths, quick, content):
    paths[1].parent.mkdir()
    paths[1].write_text(content)
    _refused(paths, quick)


def _refused(paths, sampler, **change):
    before = paths[1].read_bytes()
    job = BatchJob(*paths, **{**SETTINGS, **change})
    with pytest.raises(ValueError, match="is not of this job"):
        job.run(sampler)
    assert paths[1].read_bytes() == before


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("", "an empty line"),
        ("{", "Expecting property name"),
        ("[1]", r'"prompt" string, got \[1\]'),
        ('{"text": "a"}', '"prompt" string'),
        ('{"prompt": 1}', '"prompt" string'),
        ('{"prompt": "\\ud800"}', "surrogates not allowed"),
        ('{"prompt": "a", "b": NaN}', "expected finite numbers, got NaN"),
        ('{"prompt": "a", "b": [-Infinity]}', "expected finite numbers, got -Infinity"),
        ('{"prompt": "a", "b": 1e999}', "expected finite numbers, got 1e999"),
        ("[" * 10**5, "expected less deeply nested JSON"),
        *((f'{{"prompt": "a", "{name}": 1}}', name) for name in OUTPUT_FIELDS),
    ],
)
def test_a_bad_line_is_named_before_anything_is_written(paths, line, match):
    source, target = paths
    lines = source.read_text().splitlines()
    source.write_text("\n".join([*lines[:3], line, *lines[3:]]))
    with pytest.raises(ValueError, match=rf"prompts.jsonl, line 4: .*{match}"):
        BatchJob(source, target)
    assert not target.parent.exists()


def test_other_mistakes_are_told(paths, model, quick, tmp_path):
    source, target = paths
    with pytest.raises(FileNotFoundError):
        BatchJob(tmp_path / "missing", target)
    with pytest.raises(ValueError, match="is a directory"):
        BatchJob(source, tmp_path)
    with pytest.raises(ValueError, match="seed: expected"):
        BatchJob(source, target, seed=2**32 - COUNT)
    for name in ("source", "target", "max_new_tokens", "sampling", "stop"):
        arguments = {"source": source, "target": target, name: None}
        with pytest.raises(ValueError, match=f"^{name}: expected .* got None"):
            BatchJob(**arguments)
    with pytest.raises(ValueError, match="expected one with a tokenizer"):
        BatchJob(source, target).run(Sampler(model))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl, line 1: 'utf-8'"):
        BatchJob(latin, target)
    latin.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        BatchJob(latin, target)
    assert not target.parent.exists()


def test_a_pipe_is_an_input(paths, quick):
    """It can be read only once, so that it is copied."""
    source, target = paths
    BatchJob(*paths, **SETTINGS).run(quick)
    whole = target.read_bytes()
    target.unlink()
    pipe = source.with_name("pipe")
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(source.read_bytes()))
    writer.start()
    job = BatchJob(pipe, target, **SETTINGS)
    writer.join()
    assert job.num_prompts == COUNT
    assert job.run(quick) == COUNT and target.read_bytes() == whole
    assert job.run(quick) == 0


def test_one_run_at_a_time_writes_an_output(paths, quick):
    refused = []

    def progress(done, total):
        if done == 2:
            with pytest.raises(ValueError, match="that no other run writes"):
                BatchJob(*paths, **SETTINGS).run(quick)
            refused.append(done)

    assert BatchJob(*paths, **SETTINGS).run(quick, progress=progress) == COUNT
    assert refused == [2] and len(_read(paths[1])) == COUNT
    assert BatchJob(*paths, **SETTINGS).run(quick) == 0, "still locked"


def test_a_second_record_of_a_line_is_refused(paths, quick):
    target = paths[1]
    BatchJob(*paths, **SETTINGS).run(quick)
    records = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join([*records, records[3]]))
    before = target.read_bytes()
    number = json.loads(records[3])["line"]
    match = f"got a second one of line {number} in its line {COUNT + 1}"
    with pytest.raises(ValueError, match=match):
        BatchJob(*paths, **SETTINGS).run(quick)
    assert target.read_bytes() == before


def test_every_record_is_json(paths, quick):
    """Also of a model whose numbers are not finite."""

    class Broken(Quick):
        def iterate(self, prompts, **others):
            for index, sample in super().iterate(prompts, **others):
                sample.log_probs[:] = np.nan
                yield index, sample

    BatchJob(*paths, **SETTINGS).run(Broken(quick.model, quick.tokenizer))
    for line in paths[1].read_text().splitlines():
        record = json.loads(line, parse_constant=pytest.fail)
        assert record["log_prob"] is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(paths, quick):
    with pytest.raises(OSError, match="No space left"):
        BatchJob(paths[0], "/dev/full").run(quick)
