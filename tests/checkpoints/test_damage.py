"""Damage that leaves a file readable: changed weights, overlaps, values not finite."""

import hashlib
import logging
import struct
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recurrentgemma.checkpoints import (
    FORMATS,
    convert,
    load,
    read_config,
    save,
    tensors,
)
from recurrentgemma.checkpoints.checksums import verified
from recurrentgemma.checkpoints.official import slicing_axis
from recurrentgemma.checkpoints.state_dict_file import read_state_dict
from recurrentgemma.checkpoints.tensors import TensorSource
from tests.checkpoints.checkpoints import (
    BYTES_AT_ONCE,
    assert_same_parameters,
    config,
    every_format,
    model,
    needs_torch,
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


@every_format
def test_no_flipped_bit_changes_a_weight(layout, tmp_path):
    """Anywhere in any file but config.json, which holds no weights."""
    path = tmp_path / "saved"
    save(path, model(), None, format=layout)
    files = [file for file in path.rglob("*") if file.is_file()]
    rng, refused = np.random.default_rng(0), 0
    for file in files:
        whole = file.read_bytes()
        if file.name == "config.json":
            continue
        for offset in rng.integers(len(whole), size=16 if len(whole) > 9999 else 4):
            flip(file, offset)
            try:
                loaded, _ = load(path)
            except ValueError:
                refused += 1
            else:
                assert_same_parameters(loaded, model())
            file.write_bytes(whole)
    assert refused > 8


def test_a_fused_tensor_of_a_state_dict_has_a_checksum(tmp_path):
    """It is read along its second axis."""
    save(tmp_path / "saved", model(), None, format="official_pytorch")
    file = tmp_path / "saved" / "model.pt"
    with zipfile.ZipFile(file) as archive:
        names = [*read_state_dict(file, slicing_axis)]
        key = names.index("blocks.0.mlp_block.ffw_up.w")
        record = archive.getinfo(f"model/data/{key}")
    flip(file, record.header_offset + record.file_size)
    with pytest.raises(ValueError, match="ffw_up.w is damaged: its checksum differs"):
        load(tmp_path / "saved")


@needs_torch
@pytest.mark.parametrize("kind", ["whole", "transposed", "parts"])
def test_a_flipped_weight_that_pytorch_saved_is_seen(kind, tmp_path):
    import torch

    tensor = torch.arange(6000, dtype=torch.float32).reshape(60, 100)
    state = {
        "whole": {"a": tensor},
        "transposed": {"a": tensor.T},
        "parts": {"a": tensor[:20], "b": tensor[20:]},
    }[kind]
    file = tmp_path / "a.pt"
    torch.save(state, file)
    for name, source in read_state_dict(file, slicing_axis).items():
        np.testing.assert_array_equal(source.load(), state[name].numpy())
    with zipfile.ZipFile(file) as archive:
        record = archive.getinfo("a/data/0")
    flip(file, record.header_offset + 20_000)
    for source in read_state_dict(file, slicing_axis).values():
        with pytest.raises(ValueError, match="is damaged: its checksum differs"):
            source.load()


@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 9, 4), (3, 2, 2, 5)])
@pytest.mark.parametrize("step", [1, 2, 100])
def test_a_checksum_of_slices_along_any_axis_is_that_of_the_whole(shape, step):
    array = np.random.default_rng(0).standard_normal(shape).astype(jnp.bfloat16)
    expected = f"{zlib.crc32(array.tobytes()):08x}"
    for axis in range(len(shape)):
        source = TensorSource(
            shape,
            array.dtype,
            axis,
            lambda start, stop, axis=axis: array.take(range(start, stop), axis),
        )
        for checksum in (expected, "00000000"):
            tensor = verified(source, checksum, "x")
            starts = [*range(0, shape[axis], step)]
            for start in starts[:-1]:
                tensor.read(start, start + step)
            if checksum == expected:
                tensor.read(starts[-1], shape[axis])
                continue
            with pytest.raises(ValueError, match="x is damaged"):
                tensor.read(starts[-1], shape[axis])


def in_hub_cache(path, cache):
    """The checkpoint as Hugging Face's library keeps it: links to named blobs."""
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    for file in path.rglob("*"):
        if file.is_dir():
            continue
        content = file.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if len(content) < 2000:
            name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (cache / "blobs" / name).write_bytes(content)
        link = snapshot / file.relative_to(path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / name)
    return snapshot


@every_format
def test_files_of_a_hub_cache_are_compared_with_their_names(layout, tmp_path):
    save(tmp_path / "saved", model(), None, format=layout)
    snapshot = in_hub_cache(tmp_path / "saved", tmp_path / "cache")
    assert_same_parameters(load(snapshot)[0], model())
    config_file = snapshot / "config.json"
    whole = config_file.read_bytes()
    config_file.write_bytes(whole.replace(b"{", b"{ ", 1))
    assert read_config(snapshot) == model().config  # It reads no tensor.
    with pytest.raises(ValueError, match="config.json is damaged: its checksum"):
        load(snapshot)
    config_file.write_bytes(whole)
    largest = max(snapshot.rglob("*"), key=lambda file: file.stat().st_size)
    flip(largest, largest.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"is damaged: its|is damaged: cannot read"):
        load(snapshot)


@safetensors_formats
@pytest.mark.parametrize("kind", ["between", "at its end"])
def test_bytes_that_belong_to_no_tensor(layout, kind, tmp_path):
    save(tmp_path / "saved", model(), None, format=layout)
    file = tmp_path / "saved" / MODEL
    if kind == "between":

        def move(header):
            tensors = [entry for name, entry in header.items() if name[:2] != "__"]
            last = max(entry["data_offsets"][0] for entry in tensors)
            for entry in tensors:
                if entry["data_offsets"][0] == last:
                    entry["data_offsets"] = [x + 4 for x in entry["data_offsets"]]

        edit_header(file, move)
    file.write_bytes(file.read_bytes() + bytes(4))
    with pytest.raises(ValueError, match=f"4 bytes {kind}.* belong to no tensor"):
        load(tmp_path / "saved")


@pytest.mark.parametrize("content", ["{}", "[", '{"crc32": {}}', '{"crc32": []}'])
def test_damaged_checksums(content, tmp_path):
    save(tmp_path / "saved", model(), None, format="official_flax")
    (tmp_path / "saved" / "checksums.json").write_text(content)
    with pytest.raises(ValueError, match="checksums.json is damaged: expected the ch"):
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
