import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import pytest

from recurrentgemma import cli, cost
from recurrentgemma.checkpoints import save
from recurrentgemma.commands import train as train_command
from recurrentgemma.config import PRESETS
from recurrentgemma.sampler import Sampler
from recurrentgemma.sampling import Sampling
from recurrentgemma.tokenizer import Tokenizer
from tests.golden_models import load_golden

GOLDEN = pathlib.Path(__file__).parent / "golden" / "sampler"
PROMPT = "The ferry left"


@pytest.fixture(scope="module")
def sampler():
    return Sampler(load_golden(GOLDEN), Tokenizer(GOLDEN / "tokenizer.model"))


@pytest.fixture(scope="module")
def checkpoint(sampler, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    save(path, sampler.model, sampler.tokenizer)
    return str(path)


@pytest.fixture
def run(capsys):
    """Runs a command; its status, standard output and standard error."""

    def run(*argv):
        status = cli.main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run


def _standard_input(monkeypatch, data: bytes):
    stdin = types.SimpleNamespace(buffer=io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", stdin)


def test_overview_names_every_command(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert all(name in out for name in cli.COMMANDS)
    assert run()[:2] == (cli.EXIT_USAGE, out)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_usage_and_flags(name, run):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: recurrentgemma {name} ")
    assert "\nFlags:\n  --" in out
    if name != "convert":
        assert "\n  --model  " in out and "(default: nano)" in " ".join(out.split())


@pytest.mark.parametrize("preset", PRESETS)
def test_info_of_every_preset_needs_no_weights(preset, run):
    status, out, err = run("info", preset)
    assert (status, err) == (0, "")
    assert f"parameters             {cost.num_parameters(PRESETS[preset]):,}" in out
    grows = "global_attention" in PRESETS[preset].block_types
    assert ("cache grows" in out) == grows


def test_info_shows_memory_by_dtype_and_batch(run):
    out = run("info", "recurrentgemma-2b")[1]
    assert "cache                    17.2 MB       34.3 MB" in out
    assert "parameters            5,368.0 MB   10,731.4 MB" in out
    assert "172.5 MB" in run("info", "recurrentgemma-2b", "--batch-size=10")[1]
    small, large = (run("info", "gemma-2b", f"--context={n}")[1] for n in (8, 9))
    assert small != large


def test_info_of_a_checkpoint(run, checkpoint, sampler):
    status, out, _ = run("info", "--model", checkpoint)
    assert status == 0
    assert f"{cost.num_parameters(sampler.model.config):,}" in out


def test_sample_prints_what_the_sampler_generates(run, checkpoint, sampler):
    status, out, err = run(
        "sample",
        *(PROMPT, "--model", checkpoint, "--max-new-tokens=30", "--seed=3"),
        *("--temperature", 0.9, "--top_k=40", "--top-p=0.95", "--echo"),
    )
    [expected] = sampler(
        [PROMPT],
        max_new_tokens=30,
        sampling=Sampling(0.9, 40, 0.95),
        seed=3,
        echo=True,
    )
    assert (status, out, err) == (0, expected.text, "")


def test_sample_reads_an_argument_a_file_or_standard_input(
    run, checkpoint, tmp_path, monkeypatch
):
    flags = ("--model", checkpoint, "--max-new-tokens=5", "--temperature=0", "--echo")
    text = "--- a\n+++ b\n\u20ac"
    path = tmp_path / "prompt.txt"
    path.write_bytes(text.encode())
    _, expected, _ = run("sample", *flags, "--", text)
    assert expected.startswith(text)
    assert run("sample", *flags, "--file", path) == (0, expected, "")
    _standard_input(monkeypatch, text.encode())
    assert run("sample", *flags, "-") == (0, expected, "")
    assert run("sample", *flags, "")[0] == 0


def test_a_long_prompt_shows_a_progress_bar(run, checkpoint):
    flags = ("--model", checkpoint, "--max-new-tokens=1")
    assert run("sample", "a" * 4000, *flags)[2].count("reading") >= 1
    assert run("sample", "a", *flags)[2] == ""


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["nothing"], 2, "unknown command 'nothing'; expected sample, train, info"),
        (["sample"], 2, "expected one text .* got 0"),
        (["sample", "a", "b"], 2, "expected one text .* got 2"),
        (["sample", "a", "--file", "b"], 2, "expected one text .* got 2"),
        (["sample", "a", "--wrong"], 2, "Unknown command line flag 'wrong'"),
        (["sample", "a", "--max-new-tokens=0"], 2, "0 is not a positive integer"),
        (["sample", "a", "--max-new-tokens=-1"], 2, "-1 is not a positive integer"),
        (["sample", "a", "--top-p=1.5"], 1, r"top_p: expected .* \(0, 1\]"),
        (["sample", "a", "--top-k=0"], 1, "top_k: expected"),
        (["sample", "a", "--temperature=-1"], 1, "temperature: expected"),
        (["sample", "a", "--seed=-1"], 1, "seed: expected"),
        (["sample", "a", "--model=nanoo"], 1, "nanoo.*Did you mean nano"),
        (["sample", "a", "--model=/nowhere"], 1, "/nowhere"),
        (["sample", "a", "--model=gemma-2b"], 1, "No weights of 'gemma-2b'"),
        (["sample", "--file=/nowhere"], 1, "/nowhere"),
        (["sample", "a\udcff"], 1, "not valid UTF-8"),
        (["info", "nanoo"], 1, "nanoo"),
        (["info", "nano", "--context=0"], 2, "0 is not a positive integer"),
        (["train"], 2, "--output is required"),
        (["train", "extra", "--output=x"], 2, "unexpected argument 'extra'"),
        (["train", "--output=x", "--steps=0"], 1, "steps must be at least 1"),
        (["train", "--output=x", "--model=gone"], 1, "gone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(run, argv, status, message, checkpoint, tmp_path):
    # Where the model is not the mistake, one that exists.
    if argv[0] == "sample" and not any("--model" in flag for flag in argv):
        argv = [*argv, "--model", checkpoint]
    actual, out, err = run(*argv)
    assert (actual, out) == (status, "")
    assert err.count("\n") == 1 and err.startswith("recurrentgemma: ")
    assert re.search(message, err), err


def test_damaged_input_is_one_line(run, checkpoint, tmp_path, monkeypatch):
    damaged = tmp_path / "model"
    damaged.mkdir()
    for file in pathlib.Path(checkpoint).iterdir():
        data = file.read_bytes()
        keep = len(data) // 2 if file.suffix == ".safetensors" else len(data)
        (damaged / file.name).write_bytes(data[:keep])
    latin = tmp_path / "latin.txt"
    latin.write_bytes("\xe9t\xe9".encode("latin-1"))
    _standard_input(monkeypatch, b"\xff")
    for argv in (
        ("a", "--model", damaged),
        ("--file", latin, "--model", checkpoint),
        ("-", "--model", checkpoint),
    ):
        status, out, err = run("sample", *argv)
        assert (status, out, err.count("\n")) == (1, "", 1), err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt, cli.EXIT_INTERRUPTED),
        (BrokenPipeError, cli.EXIT_CLOSED_PIPE),
    ],
)
def test_interruptions_are_quiet(run, checkpoint, monkeypatch, error, status):
    def interrupted(*_, **__):
        raise error

    monkeypatch.setattr(Sampler, "stream", interrupted)
    assert run("sample", "a", "--model", checkpoint) == (status, "", "")


def _process(code, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}; sys.exit(cli.main())"],
        cwd=pathlib.Path(cli.__file__).parents[1],
        stderr=subprocess.PIPE,
        **kwargs,
    )


def test_a_closed_pipe_ends_the_process_quietly():
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from recurrentgemma import cli; sys.argv[1:] = ['info']"
    with _process(code, stdout=write) as process:
        os.close(write)
        _, err = process.communicate()
    assert (process.returncode, err) == (-signal.SIGPIPE, b"")


def test_ctrl_c_ends_the_process_at_once_and_quietly():
    """It comes while the process waits for its standard input."""
    code = (
        "import os, signal, sys, types; from recurrentgemma import cli; "
        "sys.argv[1:] = ['sample', '-']; "
        "interrupt = lambda: os.kill(os.getpid(), signal.SIGINT); "
        "sys.stdin = types.SimpleNamespace(buffer=types.SimpleNamespace(read=interrupt))"
    )
    with _process(code, stdout=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert (process.returncode, out, err) == (-signal.SIGINT, b"", b"")


def test_train_has_a_flag_for_every_field(run, monkeypatch, tmp_path):
    configs = []
    monkeypatch.setattr(
        train_command, "train", lambda config: configs.append(config) or tmp_path
    )
    status, out, err = run(
        "train",
        *("--output", tmp_path, "--steps=7", "--learning-rate=0.5"),
        *("--sequence_length", 64, "--tokenizer=x", "--data", "here"),
    )
    assert (status, out, err) == (0, f"{tmp_path}\n", "")
    [config] = configs
    default = train_command.TrainConfig(output="")
    assert config.output == str(tmp_path)
    assert (config.steps, config.sequence_length) == (7, 64)
    assert (config.tokenizer, config.data) == ("x", "here")
    assert config.optimizer.learning_rate == 0.5
    assert config.optimizer.b2 == default.optimizer.b2
    assert config.batch_size == default.batch_size
