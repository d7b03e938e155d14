"""A save is whole or not at all, and replaces only what a save made."""

import errno
import resource
from pathlib import Path

import pytest

from recurrentgemma.checkpoints import load, save, saving
from recurrentgemma.checkpoints.parameters import tensors_of
from tests.checkpoints.checkpoints import (
    FORMATS,
    assert_same_parameters,
    every_format,
    model,
)


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


def test_a_limit_of_the_system_on_file_sizes(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match="File too large. Nothing was written"):
            save(tmp_path / "saved", model(), None)
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


@pytest.mark.parametrize("kind", ["file", "other files", "foreign", "no config"])
def test_other_things_are_not_replaced(kind, tmp_path):
    path = tmp_path / "saved"
    if kind == "file":
        path.write_text("keep")
    else:
        save(path, model(), None)
        if kind == "other files":
            (path / "notes.txt").write_text("keep")
        elif kind == "foreign":
            (path / "config.json").write_text('{"model_type": "recurrent_gemma"}')
        else:
            (path / "config.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is a file|holds (other )?files"):
        save(path, model(seed=1), None)
    assert contents(tmp_path) == before


def test_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="'onnx'; expected native, hugging_face"):
        save(tmp_path / "saved", model(), None, format="onnx")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"post_norms": True}, "post_norms is True, must be False"),
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
