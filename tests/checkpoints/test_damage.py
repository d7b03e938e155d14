"""Damage that leaves a file readable: changed weights, overlaps, values not finite."""

import logging
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.checkpoints import FORMATS, convert, load, save, tensors
from tests.checkpoints.checkpoints import (
    BYTES_AT_ONCE,
    assert_same_parameters,
    config,
    every_format,
    model,
    safetensors_formats,
)
from tests.checkpoints.test_errors import MODEL, edit_header

LARGE = 1e30


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", BYTES_AT_ONCE)


def with_value(name, value):
    """The model with one value of a parameter replaced."""
    changed = jax.tree.map(np.array, model())
    kernel, scale = changed.blocks[1].mlp.up.kernel, changed.final_norm.scale
    {"blocks": kernel, "final": scale}[name][...].flat[7] = value
    return jax.tree.map(jnp.asarray, changed)


def flip(file, offset):
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


@safetensors_formats
@pytest.mark.parametrize("sharded", [False, True])
def test_a_flipped_weight_is_seen(layout, sharded, tmp_path):
    save(tmp_path / "saved", model(), None, format=layout)
    file = tmp_path / "saved" / MODEL
    size = struct.unpack("<Q", file.read_bytes()[:8])[0]
    flip(file, 8 + size + 4321)
    sharding = None
    if sharded:
        mesh = jax.make_mesh((8,), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        load(tmp_path / "saved", sharding=sharding)
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        convert(tmp_path / "saved", tmp_path / "new", format="native")
    assert not (tmp_path / "new").exists()


def test_a_flipped_weight_of_a_state_dict_is_seen(tmp_path):
    save(tmp_path / "saved", model(), None, format="official_pytorch")
    file = tmp_path / "saved" / "model.pt"
    with zipfile.ZipFile(file) as archive:
        record = archive.getinfo("model/data/0")
    flip(file, record.header_offset + 4000)
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        load(tmp_path / "saved")


def test_a_file_without_checksums_is_read(tmp_path):
    save(tmp_path / "saved", model(), None)

    def drop(header):
        header["__metadata__"] = {"format": "np"}

    edit_header(tmp_path / "saved" / MODEL, drop)
    assert_same_parameters(load(tmp_path / "saved")[0], model())


@safetensors_formats
def test_tensors_that_overlap(layout, tmp_path):
    save(tmp_path / "saved", model(), None, format=layout)

    def overlap(header):
        names = [name for name in header if name.endswith(("scale", "norm.weight"))]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]

    edit_header(tmp_path / "saved" / MODEL, overlap)
    with pytest.raises(ValueError, match="is damaged: .* and .* overlap"):
        load(tmp_path / "saved")


@every_format
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blocks", "final"])
def test_values_that_are_not_finite_are_warned_of(
    layout, name, value, tmp_path, caplog
):
    save(tmp_path / "saved", with_value(name, value), None, format=layout)
    with caplog.at_level(logging.WARNING, logger="absl"):
        load(tmp_path / "saved")
    full = {"blocks": "blocks.1.mlp.up.kernel", "final": "final_norm.scale"}[name]
    [message] = caplog.messages
    assert message.endswith(f"holds values that are not finite, in {full}.")


def test_finite_values_are_not_warned_of(tmp_path, caplog):
    save(tmp_path / "saved", with_value("final", LARGE), None)
    with caplog.at_level(logging.WARNING, logger="absl"):
        load(tmp_path / "saved")
    assert caplog.messages == []


@pytest.mark.parametrize("layout", FORMATS)
def test_values_that_a_dtype_cannot_hold_are_refused(layout, tmp_path):
    save(tmp_path / "saved", with_value("blocks", LARGE), None)
    message = r"float16 cannot hold the values of blocks.1.mlp.up.kernel.*1e\+30"
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "saved", tmp_path / "new", format=layout, dtype="float16")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "saved", param_dtype="float16")
    assert not (tmp_path / "new").exists()
    convert(tmp_path / "saved", tmp_path / "new", format=layout, dtype="bfloat16")
    loaded, _ = load(tmp_path / "new")
    assert float(loaded.blocks[1].mlp.up.kernel[...].max()) == pytest.approx(
        LARGE, rel=1e-2
    )


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "complex64", "U4", "no", 7])
def test_dtypes_that_no_parameter_has(dtype, tmp_path):
    save(tmp_path / "saved", model(), None)
    with pytest.raises(ValueError, match="^param_dtype: expected one of bfloat16, fl"):
        load(tmp_path / "saved", param_dtype=dtype)
    with pytest.raises(ValueError, match="^dtype: expected one of bfloat16, float16"):
        convert(tmp_path / "saved", tmp_path / "new", format="native", dtype=dtype)


def test_float64_is_refused_unless_jax_has_it(tmp_path):
    save(tmp_path / "saved", model(), None)
    with pytest.raises(ValueError, match="param_dtype: expected float32 or smaller"):
        load(tmp_path / "saved", param_dtype="float64")


def test_files_that_are_no_files(tmp_path):
    save(tmp_path / "saved", model(), None)
    (tmp_path / "saved" / "config.json").unlink()
    (tmp_path / "saved" / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"Cannot read .*config.json: Is a directory"):
        load(tmp_path / "saved")


def test_json_that_is_nested_deeply(tmp_path):
    deep = "[" * 100_000
    (tmp_path / "config.json").write_text('{"a": ' + deep)
    with pytest.raises(ValueError, match="not a JSON object: it is nested too deeply"):
        load(tmp_path)
    save(tmp_path / "saved", model(), None)
    encoded = deep.encode()
    (tmp_path / "saved" / MODEL).write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(tmp_path / "saved")
    save(tmp_path / "flax", model(), None, format="official_flax")
    (tmp_path / "flax" / "_METADATA").write_text(deep)
    with pytest.raises(ValueError, match="is not Orbax metadata"):
        load(tmp_path / "flax", config=config())
