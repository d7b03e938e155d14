"""Every layout becomes every other, bit for bit; mistakes are one line."""

import errno
import itertools
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from recurrentgemma import cli
from recurrentgemma.checkpoints import (
    FORMATS,
    convert,
    detect_format,
    load,
    save,
    tensors,
)
from recurrentgemma.config import PRESETS
from tests.checkpoints.checkpoints import (
    BYTES_AT_ONCE,
    assert_same_files,
    assert_same_parameters,
    config,
    model,
)
from tests.checkpoints.test_round_trips import TOKENIZER


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", BYTES_AT_ONCE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same checkpoint in each layout."""
    folder = tmp_path_factory.mktemp("saved")
    for layout in FORMATS:
        save(folder / layout, model(dtype="bfloat16"), None, format=layout)
    return folder


@pytest.fixture
def run(capsys):
    """Runs the command; its status, standard output and standard error."""

    def run(*argv):
        status = cli.main(["convert", *(str(argument) for argument in argv)])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_from_every_layout_to_every_layout(source, target, saved, tmp_path):
    conversion = convert(saved / source, tmp_path / "new", format=target)
    assert detect_format(tmp_path / "new") == target
    assert_same_files(target, tmp_path / "new", saved / target)
    loaded, _ = load(tmp_path / "new", param_dtype="bfloat16")
    assert_same_parameters(loaded, model(dtype="bfloat16"))
    assert (conversion.source_format, conversion.target_format) == (source, target)


def test_no_model_is_made_and_tensors_are_read_one_at_a_time(
    saved, tmp_path, monkeypatch
):
    events = []

    def watched(name, source):
        return source.watched(lambda start, part: events.append(name))

    native = FORMATS["native"].read
    monkeypatch.setattr(
        FORMATS["native"],
        "read",
        lambda path: (stored := native(path))._replace(
            tensors={name: watched(name, s) for name, s in stored.tensors.items()}
        ),
    )
    monkeypatch.setattr(jax, "device_put", lambda *_, **__: pytest.fail("device_put"))
    convert(saved / "native", tmp_path / "new", format="official_flax")
    stretches = [
        re.sub("gate|up", "gate or up", name) if ".mlp." in name else name
        for name, _ in itertools.groupby(events)
    ]
    stretches = [name for name, _ in itertools.groupby(stretches)]
    assert len(stretches) == len(set(stretches)) > 50


def test_the_report(run, saved, tmp_path):
    status, out, err = run(
        saved / "hugging_face", tmp_path / "new", "--format=official_flax"
    )
    assert (status, err) == (0, "")
    table, summary = out.strip().split("\n\n")
    header, *rows = table.splitlines()
    assert header.split() == [
        "native",
        "hugging_face",
        "official_flax",
        "shape",
        "dtype",
    ]
    assert len(rows) == len(jax.tree.leaves(model()))
    [row] = [row for row in rows if row.startswith("blocks.1.mlp.up.kernel ")]
    assert re.split("  +", row) == [
        "blocks.1.mlp.up.kernel",
        "model.layers.1.mlp_block.up_proj.weight",
        "blocks.1.mlp_block.ffw_up.w[1]",
        "[24, 32]",
        "bfloat16",
    ]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model()))
    assert summary == (
        f"{saved / 'hugging_face'} (hugging_face) -> {tmp_path / 'new'} "
        f"(official_flax): {len(rows)} tensors, {parameters:,} parameters, "
        f"{2 * parameters:,} bytes, no tokenizer."
    )


def test_another_dtype_and_a_tokenizer(run, tmp_path):
    save(tmp_path / "saved", model(vocab_size=512), None)
    arguments = (tmp_path / "saved", tmp_path / "new", "--format", "native")
    status, out, err = run(*arguments, "--dtype=bfloat16", "--tokenizer", TOKENIZER)
    assert (status, err) == (0, "")
    assert out.count("float32 -> bfloat16") == len(jax.tree.leaves(model()))
    assert out.endswith("and the tokenizer.\n")
    converted, tokenizer = load(tmp_path / "new", param_dtype="bfloat16")
    assert tokenizer is not None and tokenizer.vocab_size == 512
    expected = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype("bfloat16"), model(vocab_size=512)
    )
    assert_same_parameters(converted, expected)


def test_a_released_checkpoint_needs_a_preset(run, tmp_path, monkeypatch):
    save(tmp_path / "saved", model(), None, format="official_flax")
    (tmp_path / "saved" / "config.json").unlink()
    arguments = (tmp_path / "saved", tmp_path / "new", "--format=native")
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "they do not tell embedding_scale" in err
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(PRESETS, "tiny", config(attention_window=5))
    monkeypatch.setitem(PRESETS, "other", config(attention_window=4))
    assert run(*arguments, "--config=other")[0] == 0
    assert load(tmp_path / "new")[0].config == PRESETS["other"]
    assert run(*arguments)[0] == 0
    assert load(tmp_path / "new")[0].config == PRESETS["tiny"]


def test_a_checkpoint_can_take_its_own_place(saved, tmp_path):
    path = shutil.copytree(saved / "native", tmp_path / "copy")
    convert(path, path, format="hugging_face")
    assert_same_files("hugging_face", path, saved / "hugging_face")
    assert [file.name for file in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there(existing, saved, tmp_path, monkeypatch, run):
    if existing:
        shutil.copytree(saved / "native", tmp_path / "new")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FORMATS["hugging_face"], "_write_files", full)
    arguments = (saved / "official_flax", tmp_path / "new", "--format=hugging_face")
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "No space left on device. Nothing was written." in err
    if existing:
        assert_same_files("native", tmp_path / "new", saved / "native")
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 2, "expected SOURCE and TARGET, got 0"),
        (["nano", "new"], 2, "--format is required: one of native, hugging_face"),
        (["nano", "new", "--format=onnx"], 2, "onnx"),
        (["nano", "new", "--format=native", "--dtype=int8"], 2, "int8"),
        (["nanoo", "new", "--format=native"], 1, "Did you mean nano"),
        (["SAVED", "new", "--format=native", "--config=nanoo"], 1, "Unknown preset"),
        (["SAVED", "new", "--format=native", "--config=nano"], 1, "do not fit"),
        (["SAVED", "new", "--format=native", "--tokenizer=gone"], 1, "gone"),
        (["SAVED", "SAVED/config.json", "--format=native"], 1, "is a file"),
        (["odd", "new", "--format=hugging_face"], 1, "post_norms is True"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line(
    argv, status, message, run, saved, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save("odd", model(post_norms=True), None)
    before = sorted(tmp_path.iterdir())
    argv = [arg.replace("SAVED", str(saved / "native")) for arg in argv]
    actual, out, err = run(*argv)
    assert (actual, out, err.count("\n")) == (status, "", 1), err
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_leaves_nothing(saved, tmp_path):
    code = (
        "import os, signal, sys; from recurrentgemma import cli; "
        # A job in the background of a shell is started with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from recurrentgemma.checkpoints import hugging_face; "
        "hugging_face._write_files = lambda *_: os.kill(os.getpid(), signal.SIGINT); "
        "sys.exit(cli.main())"
    )
    arguments = [saved / "native", tmp_path / "new", "--format=hugging_face"]
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", *map(str, arguments)],
        cwd=pathlib.Path(cli.__file__).parents[1],
        check=False,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
    assert list(tmp_path.iterdir()) == []
