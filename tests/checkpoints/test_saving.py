"""A save is whole or not at all, and replaces only what a save made."""

import errno
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recurrentgemma._atomic import replace_directory, replace_file
from recurrentgemma.checkpoints import load, save, saving
from recurrentgemma.checkpoints.parameters import tensors_of
from tests.checkpoints.checkpoints import (
    FORMATS,
    assert_same_parameters,
    every_format,
    model,
)

ROOT = Path(__file__).parents[2]


def contents(folder):
    return {
        file.relative_to(folder): file.read_bytes() if file.is_file() else None
        for file in folder.rglob("*")
    }


def fail_after(monkeypatch, error, reads=5):
    """Lets the given number of tensors be read for writing, then raises."""
    left = [reads]

    def failing(source):
        def read(start, stop):
            left[0] -= 1
            if left[0] < 0:
                raise error
            return source.read(start, stop)

        return source._replace(read=read)

    def failing_tensors(model):
        return {name: failing(source) for name, source in tensors_of(model).items()}

    monkeypatch.setattr(saving, "tensors_of", failing_tensors)


@every_format
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there(layout, existing, tmp_path, monkeypatch):
    if existing:
        save(tmp_path / "saved", model(), None, format=layout)
    before = contents(tmp_path)
    fail_after(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ValueError, match="No space left on device. Nothing was"):
        save(tmp_path / "saved", model(seed=1), None, format=layout)
    assert contents(tmp_path) == before


@every_format
def test_an_interrupt_leaves_what_was_there(layout, tmp_path, monkeypatch):
    save(tmp_path / "saved", model(), None, format=layout)
    before = contents(tmp_path)
    fail_after(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "saved", model(seed=1), None, format=layout)
    assert contents(tmp_path) == before


@every_format
def test_a_limit_of_the_system_on_file_sizes(layout, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match="(?i)file too large.*Nothing was written"):
            save(tmp_path / "saved", model(), None, format=layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == {}


@every_format
def test_a_save_replaces_a_save_of_any_format(layout, tmp_path):
    save(tmp_path / "saved", model(num_layers=8), None, format=layout)
    for other in FORMATS:
        save(tmp_path / "saved", model(seed=1), None, format=other)
        assert_same_parameters(load(tmp_path / "saved")[0], model(seed=1))
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_a_failed_rename_brings_the_old_one_back(tmp_path, monkeypatch):
    save(tmp_path / "saved", model(), None)
    before = contents(tmp_path)
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ValueError, match="Input/output error. Nothing was written"):
        save(tmp_path / "saved", model(seed=1), None)
    assert contents(tmp_path) == before


def test_parents_and_empty_directories(tmp_path):
    save(tmp_path / "a" / "b", model(), None)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", model(), None)
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b")


def test_a_link_keeps_pointing(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save(tmp_path / "link", model(), None)
    assert (tmp_path / "link").is_symlink()
    assert_same_parameters(load(tmp_path / "real")[0], model())


@pytest.mark.parametrize("kind", ["file", "other file", "foreign", "no config"])
def test_other_things_are_not_replaced(kind, tmp_path):
    path = tmp_path / "saved"
    if kind == "file":
        path.write_text("keep")
    else:
        save(path, model(), None)
        if kind == "other file":
            (path / "notes.txt").write_text("keep")
        elif kind == "foreign":
            (path / "config.json").write_text('{"model_type": "recurrent_gemma"}')
        else:
            (path / "config.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is a file|holds (other )?files"):
        save(path, model(seed=1), None)
    assert contents(tmp_path) == before


@every_format
@pytest.mark.parametrize("other", ["notes.txt", "d/notes.txt", "d/e/f", "other.pt"])
def test_no_file_that_a_save_did_not_write_is_deleted(layout, other, tmp_path):
    save(tmp_path / "saved", model(), None, format=layout)
    (tmp_path / "saved" / other).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "saved" / other).write_text("keep")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds other files .*{other}"):
        save(tmp_path / "saved", model(seed=1), None, format=layout)
    assert contents(tmp_path) == before


def test_a_state_dict_beside_a_native_checkpoint_is_kept(tmp_path):
    save(tmp_path / "saved", model(), None)
    (tmp_path / "saved" / "model.pt").write_text("keep")
    with pytest.raises(ValueError, match=r"holds other files \(model.pt\)"):
        save(tmp_path / "saved", model(seed=1), None)


def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="path: expected a path, got ''"):
        save("", model(), None)
    with pytest.raises(ValueError, match="is the current directory"):
        save(".", model(), None)
    assert contents(tmp_path) == {}


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ValueError, match="Too many levels of symbolic links"):
        save(tmp_path / "a", model(), None)
    with pytest.raises(ValueError, match="There is no directory"):
        load(tmp_path / "a")


def test_what_a_killed_process_left_goes_with_the_next_save(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; "
        "from recurrentgemma._atomic import replace_directory\n"
        "with replace_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "saved"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, cwd=ROOT)
    [stale] = tmp_path.iterdir()
    assert (stale / "half").exists()
    other = tmp_path / ".other.12345678.partial"
    other.mkdir()
    with replace_directory(path) as partial:
        (partial / "whole").write_text("x")
        assert not stale.exists()
        # One that is being written stays.
        with replace_directory(path):
            assert partial.exists()
    assert {file.name for file in tmp_path.iterdir()} == {"saved", other.name}


def test_saves_at_the_same_time_all_succeed(tmp_path):
    path = tmp_path / "saved"

    def write(number):
        for _ in range(30):
            with replace_directory(path) as partial:
                (partial / "number").write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert (path / "number").read_text() in "0123"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_through_a_link_and_keeps_its_mode(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    with replace_file(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


def test_a_new_file_has_the_mode_that_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        with replace_file(tmp_path / "new") as partial:
            # As a library that makes a file for its owner alone.
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with (
            pytest.raises(OSError, match="expected a regular file"),
            replace_file(tmp_path / name),
        ):
            pytest.fail("nothing may be written")
    assert (tmp_path / "pipe").is_fifo()


def test_an_unknown_format(tmp_path):
    with pytest.raises(
        ValueError, match="expected one of native, hugging_face.* 'onnx'"
    ):
        save(tmp_path / "saved", model(), None, format="onnx")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"post_norms": True}, "post_norms is True, must be False"),
        ({"mlp_width": 0}, "intermediate_size is 0; expected a positive integer"),
        ({"num_gate_blocks": 2}, "num_gate_blocks is 2, must be 3"),
        ({"embedding_scale": 24**0.5}, "embedding_scale is 4.89.*must be 4.90"),
        ({"logits_soft_cap": None}, "logits_soft_cap is None, must be 30.0"),
        ({"block_pattern": ("global_attention",)}, "block_pattern is"),
        ({"head_dim": 4}, "head_dim is 4, must be 8"),
        ({"mlp_bias": False}, "mlp_bias is False"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "saved", model(**fields), None, format="hugging_face")
    assert contents(tmp_path) == {}
