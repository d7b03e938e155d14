import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import types
import warnings

import pytest
from flax import nnx
from safetensors import safe_open

from recurrentgemma import cli, cost
from recurrentgemma.adapters import add_adapters, save_adapters
from recurrentgemma.checkpoints import load, save
from recurrentgemma.commands import _compilation_cache, _shared
from recurrentgemma.commands import train as train_command
from recurrentgemma.commands.sample import SEPARATOR
from recurrentgemma.config import PRESETS
from recurrentgemma.generation import prefill as reading
from recurrentgemma.generation.chat import Chat
from recurrentgemma.generation.model_digest import model_digest
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.options import options
from tests.golden_models import load_golden

GOLDEN = pathlib.Path(__file__).parent / "golden" / "sampler"
PROMPT = "The ferry left"
LINES = ["Rain fell on\n", "the harbour.\r\n", "\n", "And a ferry \u20ac"]


@pytest.fixture(scope="module")
def sampler():
    tokenizer = Tokenizer(GOLDEN / "tokenizer.model")
    return Sampler(load_golden(GOLDEN), tokenizer, compile_ahead=False)


@pytest.fixture(scope="module")
def checkpoint(sampler, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    save(path, sampler.model, sampler.tokenizer)
    return str(path)


@pytest.fixture(scope="module")
def saved_prefix(sampler, tmp_path_factory):
    path = tmp_path_factory.mktemp("prefix") / "text.prefix"
    sampler.prefill(iter(LINES)).save(path)
    return path


@pytest.fixture
def run(capsys):
    """Runs a command; its status, standard output and standard error."""

    def run(*argv):
        status = cli.main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run


def _digests(prefix):
    """Of the model and of all arrays."""
    with safe_open(prefix, framework="numpy") as file:
        return file.metadata()


class _Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def _standard_input(monkeypatch, data: bytes, kind=io.TextIOWrapper):
    stdin = kind(io.BytesIO(data), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)


def test_overview_names_every_command(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert all(name in out for name in cli.COMMANDS)
    assert run()[:2] == (cli.EXIT_USAGE, out)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS.keys() - {"bench"}))
def test_help_shows_usage_and_flags(name, run):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: recurrentgemma {name} ")
    assert "\nFlags:\n  --" in out
    if name not in ("convert", "plan"):
        assert "\n  --model  " in out and "(default: nano)" in " ".join(out.split())


@pytest.mark.parametrize("preset", PRESETS)
def test_info_of_every_preset_needs_no_weights(preset, run):
    status, out, err = run("info", preset)
    assert (status, err) == (0, "")
    assert f"parameters             {cost.num_parameters(PRESETS[preset]):,}" in out
    grows = "global_attention" in PRESETS[preset].block_types
    assert ("cache grows" in out) == ("A prefix grows" in out) == grows
    assert ("A prefix is the cache of one text, however long" in out) != grows


def test_info_shows_memory_by_dtype_and_batch(run):
    out = run("info", "recurrentgemma-2b")[1]
    assert "cache                    17.3 MB       34.4 MB" in out
    assert "parameters            5,368.0 MB   10,731.4 MB" in out
    assert "173.0 MB" in run("info", "recurrentgemma-2b", "--batch-size=10")[1]
    assert "however long: 17.3 MB or 34.4 MB." in out
    small, large = (run("info", "gemma-2b", f"--context={n}")[1] for n in (8, 9))
    assert small != large
    # 18 layers, a key and a value of 256 each, and the position.
    key_values, positions = 18 * 2 * 256, 18 * 4
    growth = (
        f"by {2 * key_values + positions:,} or {4 * key_values + positions:,} "
        "bytes a token."
    )
    assert growth in small and growth in large


def test_info_of_a_checkpoint(run, checkpoint, sampler):
    status, out, _ = run("info", "--model", checkpoint)
    assert status == 0
    assert f"{cost.num_parameters(sampler.model.config):,}" in out


def test_sample_prints_what_the_sampler_generates(run, checkpoint, sampler):
    settings = {
        "max_new_tokens": 30,
        "sampling": Sampling(0.9, 40, 0.95, 0.01, 1.2),
        "seed": 3,
    }
    argv = [
        *("sample", PROMPT, "--model", checkpoint, "--max-new-tokens=30", "--seed=3"),
        *("--temperature", 0.9, "--top_k=40", "--top-p=0.95", "--min-p=0.01"),
        "--repetition-penalty=1.2",
    ]
    [whole] = sampler([PROMPT], **settings)
    assert run(*argv) == (0, whole.text, "")
    assert run(*argv, "--echo") == (0, PROMPT + whole.text, "")
    assert run(*argv, "--draft", checkpoint) == (0, whole.text, "")
    status, _, err = run(*argv, "--draft=nano")
    assert status == 1 and "draft: expected a model of the same" in err
    stop = whole.text[8:10]
    [stopped] = sampler([PROMPT], stop=[stop], **settings)
    assert run(*argv, "--stop=\u2603", "--stop", stop) == (0, stopped.text, "")
    assert len(stopped.text) <= 8


def test_the_model_that_flags_ask_for(run, checkpoint, tmp_path):
    """Quantised, and with the adapters that belong to it."""
    base, _ = load(checkpoint, quantize="int8")
    adapted = add_adapters(base, rank=2, rngs=nnx.Rngs(0))
    path = tmp_path / "adapters.safetensors"
    save_adapters(path, adapted)
    flags = {"model": checkpoint, "quantize": "int8", "adapters": str(path)}
    loaded, _ = _shared.load_sampler(flags)
    assert model_digest(loaded.model) == model_digest(adapted)
    status, _, error = run("sample", "a", "--model", checkpoint, "--adapters", "none")
    assert status == 1 and "--adapters: there is no file none" in error
    status, _, error = run(
        *("sample", "a", "--model", checkpoint, "--adapters", str(path))
    )
    assert status == 1 and "belongs to another model" in error


def test_sample_prints_several_samples_one_after_another(run, checkpoint, sampler):
    settings = {"max_new_tokens": 8, "seed": 5}
    samples = sampler([PROMPT], num_samples=2, **settings)
    first, second = (PROMPT + sample.text for sample in samples)
    assert run(
        *("sample", PROMPT, "--model", checkpoint, "--max-new-tokens=8", "--seed=5"),
        *("--num-samples=2", "--echo"),
    ) == (0, f"{first}\n{SEPARATOR}\n{second}\n", "")


def test_a_prefix_comes_before_the_text(run, checkpoint, sampler, saved_prefix):
    prefix = Prefix.load(saved_prefix, sampler.model)
    flags = ("--model", checkpoint, "--max-new-tokens=8", "--temperature=0")
    for text, arguments in ((PROMPT, [PROMPT]), ("", [])):
        [expected] = sampler(
            [text], prefix=prefix, max_new_tokens=8, sampling=Sampling(0)
        )
        actual = run("sample", *arguments, "--prefix", saved_prefix, *flags)
        assert actual == (0, expected.text, "")


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


def test_a_long_text_shows_a_progress_bar(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(_shared, "LONG_TEXT", 20)
    flags = ("--model", checkpoint, "--max-new-tokens=1")
    assert run("sample", "ab" * 40, *flags)[2].count("reading") >= 1
    assert run("sample", "a", *flags)[2] == ""
    path = tmp_path / "text.txt"
    path.write_text("ab\n" * 40)
    flags = ("--model", checkpoint, "--output", tmp_path / "text.prefix")
    assert run("prefill", "--file", path, *flags)[2].count("reading") >= 1
    assert run("prefill", "a", *flags)[2] == ""


def test_prefill_saves_what_the_sampler_reads(
    run, checkpoint, sampler, tmp_path, saved_prefix, monkeypatch
):
    text, output = tmp_path / "text.txt", tmp_path / "deep" / "text.prefix"
    text.write_bytes("".join(LINES).encode())
    argv = ("prefill", "--model", checkpoint, "--output", output)
    status, out, err = run(*argv, "--file", text)
    expected = Prefix.load(saved_prefix, sampler.model)
    count = int(expected.num_tokens[0])
    size = output.stat().st_size
    assert (status, err) == (0, "")
    assert out == f"{output}: {count:,} tokens, {size:,} bytes\n"
    assert _digests(output) == _digests(saved_prefix)
    _standard_input(monkeypatch, text.read_bytes())
    output.unlink()
    assert run(*argv, "-")[:2] == (0, out)
    assert _digests(output) == _digests(saved_prefix)
    more = len(sampler.tokenizer.encode("more", add_bos=False))
    status, out, _ = run(*argv, "more", "--prefix", output)
    assert f": {more} tokens after the prefix, {count + more:,} tokens, " in out
    assert Prefix.load(output, sampler.model).num_tokens == [count + more]


def test_a_text_is_read_line_by_line_in_parts_of_bounded_size(monkeypatch):
    monkeypatch.setattr(_shared, "LONGEST_LINE", 4)
    text = "ab\n\u20ac\u20ac\u20ac\u20ac\r\n\u20ac"
    _standard_input(monkeypatch, text.encode())
    lines = list(_shared.find_text({"file": None}, ["-"]))
    assert "".join(lines) == text
    assert lines[0] == "ab\n" and max(len(line.encode()) for line in lines) <= 6


def test_score_shows_totals_and_tokens(
    run, checkpoint, sampler, tmp_path, saved_prefix
):
    expected = sampler.score(PROMPT)
    argv = ("score", "--model", checkpoint)
    status, totals, err = run(*argv, PROMPT)
    assert (status, err) == (0, "")
    assert [line.split() for line in totals.splitlines()] == [
        ["tokens", str(len(expected.tokens))],
        ["bytes", str(len(PROMPT))],
        ["perplexity", f"{expected.perplexity:.4f}"],
        ["bits", "per", "byte", f"{expected.bits_per_byte:.4f}"],
    ]
    status, out, err = run(*argv, PROMPT, "--tokens")
    assert (status, err) == (0, "") and out.endswith(totals)
    lines = [line.split("\t") for line in out.removesuffix(totals).splitlines()]
    pieces = "".join(json.loads(piece) for piece, _ in lines)
    assert pieces.replace("\u2581", " ") == PROMPT
    assert [value for _, value in lines] == [f"{x:.4f}" for x in expected.log_probs]
    # What follows a prefix, which is then saved with it.
    prefix = Prefix.load(saved_prefix, sampler.model)
    expected = sampler.score(PROMPT, prefix=prefix)
    output = tmp_path / "more.prefix"
    out = run(*argv, PROMPT, "--prefix", saved_prefix, "--save-prefix", output)[1]
    assert f"perplexity      {expected.perplexity:.4f}\n" in out
    expected.prefix.save(tmp_path / "expected")
    assert _digests(output) == _digests(tmp_path / "expected")


def test_an_endless_text_is_scored_as_it_comes(run, checkpoint, monkeypatch):
    """Running totals on a terminal, lines of tokens; until Ctrl-C."""
    monkeypatch.setattr(reading, "PIECE_TOKENS", 16)
    left = []

    def readline(limit):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return b"a harbour\n"

    buffer = types.SimpleNamespace(readline=readline)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=buffer))
    argv = ("score", "-", "--model", checkpoint)
    left += range(100)
    status, out, err = run(*argv, "--tokens")
    assert (status, err) == (cli.EXIT_INTERRUPTED, "")
    assert out.count("\n") > 100
    stderr = _Terminal(io.BytesIO(), write_through=True)
    monkeypatch.setattr(sys, "stderr", stderr)
    left += range(100)
    assert run(*argv)[:2] == (cli.EXIT_INTERRUPTED, "")
    assert b"bits per byte" in stderr.buffer.getvalue()


CONVERSATION = """\
Hello
One \\
and two
\"\"\"
/not a command

\"\"\"

/undo now
/nothing
/save
/save {path}
/undo
/undo
/load {path}
/undo
/undo
\xff
/undo
Hello
/quit
Hello
"""


def test_chat_from_a_pipe(run, checkpoint, sampler, tmp_path, monkeypatch):
    path = tmp_path / "chat.prefix"
    conversation = CONVERSATION.replace("{path}", str(path)).encode("latin-1")
    _standard_input(monkeypatch, conversation)
    flags = ("--temperature=0", "--max-new-tokens=6", "--system=Be brief.")
    status, out, err = run("chat", "--model", checkpoint, *flags)
    chat = Chat(sampler, system="Be brief.", sampling=Sampling(0), max_new_tokens=6)
    texts = ("Hello", "One \nand two", "/not a command\n")
    with pytest.warns(UserWarning, match="not instruction-tuned") as warned:
        answers = [chat.send(text) for text in texts]
    assert (status, out) == (0, "".join(f"{a}\n" for a in [*answers, answers[0]]))
    assert err.splitlines()[0] == str(warned[0].message)
    assert re.fullmatch(
        r"'/undo now' is no command; .*\n'/nothing' is no command; .*\n"
        r"/save: expected a file\n"
        r"The text is not valid UTF-8.*\nThere is no turn to take back.\n",
        err.split("\n", 1)[1],
    ), err
    saved = Prefix.load(path, sampler.model)
    assert saved.num_tokens == [chat.num_tokens]
    _standard_input(monkeypatch, b"More")
    out = run("chat", "--model", checkpoint, "--load", path, *flags)[1]
    assert out == chat.send("More") + "\n"


def test_chat_in_a_terminal_shows_the_length(run, checkpoint, monkeypatch):
    _standard_input(monkeypatch, b"Hello\n/help\n", _Terminal)
    flags = ("--temperature=0", "--max-new-tokens=6")
    status, out, err = run("chat", "--model", checkpoint, *flags)
    assert status == 0 and "/undo        take the last turn back" in err
    assert re.fullmatch(
        r"\[0 tokens\] > .*\n\[(\d+) tokens\] > \[\1 tokens\] > ", out, re.DOTALL
    )


def test_chat_ends_quietly_with_its_terminal(run, checkpoint, monkeypatch):
    def closed():
        raise OSError(5, "Input/output error")

    stdin = types.SimpleNamespace(isatty=lambda: False, readline=closed)
    monkeypatch.setattr("builtins.input", lambda _: closed())
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("chat", "--model", checkpoint) == (0, "", "")


def test_batch_continues_every_prompt_once(run, checkpoint, sampler, tmp_path):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    source.write_text("".join(f'{{"prompt": "{n} boats"}}\n' for n in range(3)))
    argv = ("batch", source, target, "--model", checkpoint)
    flags = ("--max-new-tokens=8", "--batch-size=2", "--seed=4")
    status, out, err = run(*argv, *flags)
    assert (status, out) == (0, f"{target}: 3 texts written\n")
    assert "writing" in err
    before = target.read_text()
    records = {r["line"]: r for r in map(json.loads, before.splitlines())}
    for n in range(3):
        [expected] = sampler([f"{n} boats"], max_new_tokens=8, seed=5 + n)
        assert records[n + 1]["text"] == expected.text
    out = run(*argv, *flags)[1]
    assert out == f"{target}: 0 texts written, 3 were there\n"
    status, out, err = run(*argv, "--seed=3")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "the record of line 1 is not of this job" in err
    assert target.read_text() == before


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["nothing"], 2, "unknown command 'nothing'; expected sample, chat, score"),
        (["sample"], 2, "expected one text .* got 0"),
        (["sample", "a", "b"], 2, "expected one text .* got 2"),
        (["sample", "a", "--file", "b"], 2, "expected one text .* got 2"),
        (["sample", "a", "--wrong"], 2, "Unknown command line flag 'wrong'"),
        (["sample", "a", "--max-new-tokens=0"], 2, "0 is not a positive integer"),
        (["sample", "a", "--max-new-tokens=-1"], 2, "-1 is not a positive integer"),
        (["sample", "a", "--num-samples=0"], 2, "0 is not a positive integer"),
        (["sample", "a", "--stop=x", "--stop="], 2, "--stop: expected a string"),
        (["sample", "a", "--min-p=2"], 1, "min_p: expected"),
        (["sample", "a", "--repetition-penalty=0"], 1, "repetition_penalty: expected"),
        (["sample", "a", "--prefix=/nowhere"], 1, "--prefix: there is no file"),
        (["sample", "a", f"--prefix={__file__}"], 1, "is no prefix"),
        (
            ["sample", "a", "--top-p=1.5"],
            1,
            r"top_p: expected .* above 0 and at most 1",
        ),
        (["sample", "a", "--top-k=0"], 1, "top_k: expected"),
        (["sample", "a", "--temperature=-1"], 1, "temperature: expected"),
        (["sample", "a", "--seed=-1"], 1, "seed: expected"),
        (["sample", "a", "--model=nanoo"], 1, r"nanoo.*Did you mean nano\?"),
        (["sample", "a", "--model=/nowhere"], 1, "/nowhere"),
        (["sample", "a", "--model=gemma-2b"], 1, "No weights of 'gemma-2b'"),
        (["sample", "--file=/nowhere"], 1, "/nowhere"),
        (["sample", "a\udcff"], 1, "not valid UTF-8"),
        (["prefill", "a"], 2, "--output is required"),
        (["prefill", "--output=x"], 2, "expected one text .* got 0"),
        (["prefill", "a", "--output=/"], 1, "/ is a directory"),
        (["prefill", "a", f"--output={__file__}/x"], 1, "[Ee]xists"),
        (["prefill", "--file=/dev/null", "--output=x"], 1, "at least one token"),
        (["score"], 2, "expected one text .* got 0"),
        (["score", ""], 1, "nothing to score"),
        (["score", "a", "--save-prefix=/"], 1, "/ is a directory"),
        (["chat", "Hello"], 2, "unexpected argument 'Hello'"),
        (["chat", "--load=/nowhere"], 1, "--load: there is no file"),
        (["chat", "--stop=x"], 2, "Unknown command line flag 'stop'"),
        (["batch", "a"], 2, "expected INPUT and OUTPUT, got 1"),
        (["batch", "/nowhere", "b"], 1, "/nowhere"),
        (["batch", __file__, "b"], 1, "test_cli.py, line 1: "),
        (["batch", "a", "b", "--batch-size=0"], 2, "0 is not a positive integer"),
        (["info", "nanoo"], 1, "nanoo"),
        (["info", "nano", "--context=0"], 2, "0 is not a positive integer"),
        (["tune", "--output=x"], 2, "--data is required"),
        (["tune", "--data=x"], 2, "--output is required"),
        (["tune", "--data=gone", "--output=x"], 1, "data: expected .*gone"),
        (["tune", f"--data={__file__}", "--output=x", "--steps=0"], 1, "steps: "),
        (["train"], 2, "--output is required"),
        (["train", "extra", "--output=x"], 2, "unexpected argument 'extra'"),
        (["train", "--output=x", "--steps=0"], 1, "steps: expected an integer of"),
        (["train", "--output=x", "--model=gone"], 1, "gone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(
    run, argv, status, message, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    # Where the model is not the mistake, one that exists.
    if argv[0] not in ("info", "train", "nothing") and not any(
        "--model" in flag for flag in argv
    ):
        argv = [*argv, "--model", checkpoint]
    actual, out, err = run(*argv)
    assert (actual, out) == (status, "")
    assert err.count("\n") == 1 and err.startswith("recurrentgemma: ")
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_damaged_input_is_one_line(run, checkpoint, tmp_path, monkeypatch):
    damaged = tmp_path / "model"
    damaged.mkdir()
    for file in pathlib.Path(checkpoint).iterdir():
        data = file.read_bytes()
        keep = len(data) // 2 if file.suffix == ".safetensors" else len(data)
        (damaged / file.name).write_bytes(data[:keep])
    latin = tmp_path / "latin.txt"
    latin.write_bytes("a\n\xe9t\xe9\n".encode("latin-1"))
    _standard_input(monkeypatch, "\u20ac".encode()[:2])
    prefix, model = tmp_path / "text.prefix", ("--model", checkpoint)
    for argv, message in (
        (("sample", "a", "--model", damaged), "model"),
        (("sample", "--file", latin, *model), "latin.txt, line 2: not UTF-8"),
        (("sample", "-", *model), "standard input, line 1: not UTF-8"),
        (("score", "--file", latin, *model), "latin.txt, line 2: not UTF-8"),
        (("prefill", "--file", latin, "--output", prefix, *model), "latin.txt, line 2"),
    ):
        status, out, err = run(*argv)
        assert (status, out, err.count("\n")) == (1, "", 1), err
        assert message in err
    assert not prefix.exists()


def test_a_prefix_of_another_model_is_refused(
    run, checkpoint, sampler, saved_prefix, tmp_path
):
    prefix = Prefix.load(saved_prefix, sampler.model)
    other = tmp_path / "other.prefix"
    dataclasses.replace(prefix, model_digest="0:0").save(other)
    model = ("--model", checkpoint)
    for argv in (
        ("sample", "a", "--prefix", other),
        ("score", "a", "--prefix", other),
        ("prefill", "a", "--prefix", other, "--output", tmp_path / "x"),
        ("chat", "--load", other),
    ):
        status, out, err = run(*argv, *model)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "made by a model of another architecture" in err


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
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
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
        "interrupt = lambda _: os.kill(os.getpid(), signal.SIGINT); "
        "sys.stdin = types.SimpleNamespace(buffer=types.SimpleNamespace(readline=interrupt))"
    )
    with _process(code, stdout=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert (process.returncode, out, err) == (-signal.SIGINT, b"", b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_once():
    code = "import sys; from recurrentgemma import cli; sys.argv[1:] = ['info']"
    with open("/dev/full", "wb") as full, _process(code, stdout=full) as process:
        _, err = process.communicate()
    assert process.returncode == 1
    assert err.decode().count("\n") == 1 and b"No space left" in err


@pytest.mark.parametrize(
    ("command", "closed", "status", "message"),
    [
        ("sample -", [0], 1, "sample: standard input is closed"),
        ("chat", [0], 1, "chat: standard input is closed"),
        ("info", [0], 0, ""),
        ("info", [1], 1, "standard output is closed"),
        ("info", [2], 0, None),
        ("info /nowhere", [2], 1, None),
        ("info /nowhere", [0, 1, 2], 1, None),
    ],
)
def test_closed_standard_streams_are_one_line(command, closed, status, message):
    """And an output that cannot be shown is no success."""
    code = (
        "import sys; from recurrentgemma import cli; sys.argv[1:] = sys.argv[1].split()"
    )
    streams = " ".join(f"{stream}>&-" for stream in closed)
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1; sys.exit(cli.main())" "$2" {streams}']
        + [sys.executable, code, command],
        cwd=pathlib.Path(cli.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    if message is None:
        assert done.stderr == ""
    else:
        assert re.fullmatch(f"(recurrentgemma: {message}.*\n)?", done.stderr)
        assert bool(done.stderr) == bool(message)
    assert bool(done.stdout) == (status == 0)


ENDLESS_CHAT = """
import fcntl, signal, sys, termios, types
from recurrentgemma import cli
from recurrentgemma.generation import chat
from recurrentgemma.commands import _compilation_cache, _shared
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it.
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
_shared.load_sampler = lambda _: (None, None)
chat.Chat = lambda *_, **__: types.SimpleNamespace(
    num_tokens=0, stream=lambda _: iter(lambda: "word ", None)
)
sys.argv[1:] = ["chat"]"""


def test_a_terminal_that_closes_ends_a_chat_quietly():
    """While an answer is being written."""
    terminal, inside = os.openpty()
    with _process(
        ENDLESS_CHAT, stdin=inside, stdout=inside, start_new_session=True
    ) as process:
        os.close(inside)
        os.write(terminal, b"Hello\n")
        shown = b""
        while b"word word" not in shown:
            shown += os.read(terminal, 1000)
        os.close(terminal)
        _, err = process.communicate()
    assert b"[0 tokens] > " in shown
    assert (process.returncode, err) == (-signal.SIGHUP, b"")


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
    assert (config.steps, config.data.sequence_length) == (7, 64)
    assert (config.tokenizer, config.data.data) == ("x", "here")
    assert config.optimizer.learning_rate == 0.5
    assert config.optimizer.b2 == default.optimizer.b2
    assert config.data.batch_size == default.data.batch_size


def test_the_help_of_train_explains_every_field(run):
    status, out, _ = run("train", "--help")
    assert status == 0
    text = " ".join(out.split())
    for field in options(train_command.TrainConfig):
        name = field.name.replace("_", "-")
        flag = f"--[no]{name}" if isinstance(field.default, bool) else f"--{name}"
        assert f"{flag} {train_command.help_of(field)}" in text


def test_only_names_of_flags_are_normalised(run, checkpoint, sampler, monkeypatch):
    """Values are passed on as they are, whatever they look like."""
    stops = []
    monkeypatch.setattr(
        Sampler, "stream", lambda *_, **settings: stops.append(settings["stop"]) or []
    )
    argv = ("sample", PROMPT, "--model", checkpoint)
    assert run(*argv, "--stop", "--my_stop_word")[0] == 0
    assert run(*argv, "--stop", "-h", "--max_new_tokens", "5")[:2] == (0, "")
    assert run(*argv, "--stop=--help", "--stop", "--")[0] == 0
    assert stops == [("--my_stop_word",), ("-h",), ("--help", "--")]
    assert run(*argv, "--stop")[0] == cli.EXIT_USAGE


def test_a_file_of_known_size_shows_how_much_is_left(
    run, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(_shared, "LONG_TEXT", 20)
    path = tmp_path / "text.txt"
    path.write_text("ab\n" * 400)
    calls = []
    show = _shared.ProgressBar.__call__
    monkeypatch.setattr(
        _shared.ProgressBar,
        "__call__",
        lambda bar, *both: calls.append(both) or show(bar, *both),
    )
    flags = ("--model", checkpoint, "--output", tmp_path / "text.prefix")
    status, _, err = run("prefill", "--file", path, *flags)
    assert status == 0 and calls[0] == (3, 1200) and calls[-1] == (1200, 1200)
    assert "1.20k" in err
    stderr = _Terminal(io.BytesIO(), write_through=True)
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run("score", "--file", path, "--model", checkpoint)[0] == 0
    assert b"/1.20k" in stderr.buffer.getvalue()


COUNTED = """
import sys
from recurrentgemma import cli
from recurrentgemma.commands import _compilation_cache
_compilation_cache.enable()
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
status = cli.main()
hits, misses = (
    events.count(f"/jax/compilation_cache/cache_{kind}") for kind in ("hits", "misses")
)
print(f"{hits} hits, {misses} misses", file=sys.stderr)
"""


def test_compiled_programs_are_kept_for_the_next_command(checkpoint, tmp_path):
    """In the user's cache folder; damaged entries are replaced, in silence."""

    def run(*start):
        argv = ("sample", PROMPT, "--model", checkpoint, "--max-new-tokens=2")
        return subprocess.run(
            [sys.executable, *start, *argv],
            cwd=pathlib.Path(cli.__file__).parents[1],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )

    first = run("-m", "recurrentgemma")
    entries = list((tmp_path / "recurrentgemma" / "jax").rglob("*-cache"))
    assert any("decode_block" in entry.name for entry in entries)
    second = run("-c", COUNTED)
    # Programs that compile fast are not kept: whether they are is a matter of load.
    hits = re.fullmatch(r"(\d+) hits, \d+ misses\n", second.stderr)
    assert hits and int(hits[1]) >= 2, second.stderr
    for entry in entries:
        entry.write_bytes(b"damaged" + entry.read_bytes()[7:100])
    damaged = run("-m", "recurrentgemma")
    assert first.stdout == second.stdout == damaged.stdout
    assert first.stderr == damaged.stderr == ""
    left = [entry.read_bytes() for entry in entries if entry.exists()]
    assert left and not any(data.startswith(b"damaged") for data in left)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """What `enable` may change, and a cache folder of the test."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for name in ("DIR", "MIN_COMPILE_TIME_SECS"):
        for kind in ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE"):
            # Set first, so that it is removed again at the end.
            monkeypatch.setenv(f"{kind}_{name}", "")
            monkeypatch.delenv(f"{kind}_{name}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        yield os.environ


def test_the_cache_is_in_a_folder_of_the_user(environment, tmp_path, monkeypatch):
    _compilation_cache.enable()
    folder = pathlib.Path(environment["JAX_COMPILATION_CACHE_DIR"])
    assert folder.parent == tmp_path / "cache" / "recurrentgemma" / "jax"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    user_folder = _compilation_cache.user_folder()
    assert user_folder == tmp_path / ".cache" / "recurrentgemma" / "jax"
    environment["JAX_COMPILATION_CACHE_DIR"] = "/elsewhere"
    _compilation_cache.enable()
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize("trouble", ["a file", "another owner"])
def test_a_folder_that_cannot_be_used_is_left_alone(
    environment, tmp_path, monkeypatch, trouble
):
    if trouble == "a file":
        (tmp_path / "cache").write_text("mine")
    else:
        monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    _compilation_cache.enable()
    assert "JAX_COMPILATION_CACHE_DIR" not in environment


def test_the_oldest_programs_are_removed(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        path = tmp_path / "machine" / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10)
        os.utime(path, (1000 - age, 1000 - age))
    _compilation_cache.remove_oldest(tmp_path, 25)
    left = {path.name for path in (tmp_path / "machine").iterdir()}
    assert left == {"new-cache", "middle-cache"}


def test_tune_learns_a_prefix_that_other_commands_read(run, checkpoint, tmp_path):
    for i in range(24):
        (tmp_path / f"{i}.txt").write_text("".join(LINES), encoding="utf-8")
    output = tmp_path / "learned.prefix"
    argv = ["tune", "--model", checkpoint, "--data", tmp_path, "--output", output]
    sizes = ["--batch-size=2", "--sequence-length=16", "--steps=6"]
    status, out, _ = run(*argv, *sizes, "--learning-rate=0.1")
    assert status == 0
    before, after = map(float, re.findall(r"loss (\S+) before, (\S+) nats", out)[0])
    assert after < before
    score = ["score", "--model", checkpoint, "--prefix", output, PROMPT]
    status, out, _ = run(*score)
    assert status == 0 and "perplexity" in out
