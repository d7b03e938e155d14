"""The released Flax and PyTorch layouts: what is written by others, and no config."""

import importlib.util
import json
import logging
import os
import pickle
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from safetensors.numpy import load_file

from recurrentgemma.checkpoints import (
    load,
    official_flax,
    read_config,
    save,
    tensors,
)
from recurrentgemma.checkpoints.official import slicing_axis
from recurrentgemma.checkpoints.state_dict_file import (
    RECORD_ALIGNMENT,
    read_state_dict,
    write_state_dict,
)
from recurrentgemma.checkpoints.tensors import TensorSource, array_source
from recurrentgemma.config import PRESETS
from tests.checkpoints.checkpoints import (
    BYTES_AT_ONCE,
    assert_same_parameters,
    config,
    model,
)
from tests.checkpoints.test_round_trips import TOKENIZER
from tests.golden_models import GOLDEN, load_golden

HAWK = GOLDEN / "deepmind" / "hawk"
STATE_DICT = GOLDEN / "deepmind" / "hawk" / "state_dict.pt"
"""Some tensors of `torch_state_dict.safetensors`, saved by PyTorch 2.13 as parameters,
in float32 and bfloat16, one of them transposed."""
official_formats = pytest.mark.parametrize(
    "layout", ["official_flax", "official_pytorch"]
)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", BYTES_AT_ONCE)


def released(layout, folder, **fields):
    """A checkpoint as the official package writes it: without a config."""
    save(folder, model(**fields), None, format=layout)
    (folder / "config.json").unlink()
    return folder


def test_the_official_orbax_directory():
    expected = load_golden(HAWK)
    loaded, tokenizer = load(HAWK / "orbax", config=expected.config)
    assert tokenizer is None
    assert_same_parameters(loaded, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_reads_what_is_written(dtype, tmp_path):
    original = model(dtype=dtype)
    save(tmp_path / "saved", original, None, format="official_flax")
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "saved")
    assert list(restored) == ["params"]
    block = restored["params"]["blocks.0"]
    up = block["mlp_block"]["ffw_up"]
    mlp = original.blocks[0].mlp
    assert up["w"].dtype == dtype
    for half, layer in enumerate((mlp.gate, mlp.up)):
        np.testing.assert_array_equal(up["w"][half], layer.kernel[...])
        np.testing.assert_array_equal(up["b"][half, 0, 0], layer.bias[...])
    np.testing.assert_array_equal(
        block["recurrent_block"]["rg_lru"]["a_gate"]["w"],
        original.blocks[0].mixer.rg_lru.recurrence_gate.kernel[...],
    )


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_all_that_orbax_writes_is_read(ocdbt, zarr3, tmp_path):
    original = model(dtype="bfloat16")
    save(tmp_path / "saved", original, None, format="official_flax")
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "saved")
    handler = orbax.checkpoint.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with orbax.checkpoint.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "theirs", jax.tree.map(jnp.asarray, restored))
    loaded, _ = load(tmp_path / "theirs", config=config(), param_dtype="bfloat16")
    assert_same_parameters(loaded, original)


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_tensors_in_parts(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(official_flax, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(official_flax, "MIN_KEPT_BYTES", kept)
    save(tmp_path / "saved", model(), None, format="official_flax")
    source = official_flax.read(tmp_path / "saved").tensors["blocks.0.mlp.up.kernel"]
    np.testing.assert_array_equal(
        source.read(3, 9), model().blocks[0].mlp.up.kernel[3:9]
    )
    assert_same_parameters(load(tmp_path / "saved")[0], model())


def test_a_large_tensor_is_decoded_once(tmp_path, monkeypatch):
    save(tmp_path / "saved", model(), None, format="official_flax")
    monkeypatch.setattr(official_flax, "MIN_KEPT_BYTES", 0)
    sources = official_flax.read(tmp_path / "saved").tensors
    up = sources["blocks.0.mlp.up.kernel"]
    parts = [up.read(i, i + 1).base for i in range(4)]
    assert parts[0] is not None and all(part is parts[0] for part in parts)
    assert sources["blocks.0.mlp.gate.kernel"].read(0, 1).base is parts[0]


@official_formats
def test_zeros_of_both_signs(layout, tmp_path):
    zeros = jax.tree.map(jnp.zeros_like, model())
    for original in (zeros, jax.tree.map(jnp.negative, zeros)):
        save(tmp_path / "saved", original, None, format=layout)
        assert_same_parameters(load(tmp_path / "saved")[0], original)


@official_formats
def test_the_shapes_of_a_preset_mean_that_preset(layout, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(PRESETS, "other", config(mlp_width=48))
    monkeypatch.setitem(PRESETS, "tiny", config(attention_window=5))
    path = released(layout, tmp_path / "released")
    with caplog.at_level(logging.INFO, logger="absl"):
        loaded, _ = load(path)
    assert loaded.config == read_config(path) == PRESETS["tiny"]
    assert f"{path} stores no config; it has the shapes of tiny." in caplog.messages
    given = config(attention_window=4)
    assert load(path, config=given)[0].config == given


@official_formats
def test_other_shapes_need_a_config(layout, tmp_path):
    path = released(layout, tmp_path / "released")
    with pytest.raises(ValueError, match=r"pass config=\. The shapes tell") as error:
        load(path)
    message = str(error.value)
    for name in ("vocab_size", "width", "mlp_width", "num_layers", "lru_width"):
        assert f"{name}={getattr(config(), name)!r}" in message
    assert "'recurrent', 'recurrent', 'local_attention'" in message
    assert message.endswith(
        "do not tell embedding_scale, logits_soft_cap, attention_window."
    )
    attention = released(
        layout, tmp_path / "attention", block_pattern=("local_attention",)
    )
    with pytest.raises(ValueError, match="attention_window, num_heads, head_dim"):
        read_config(attention)


@official_formats
def test_the_tokenizer_beside_a_released_checkpoint(layout, tmp_path):
    path = released(layout, tmp_path / "2b", vocab_size=512)
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    given = config(vocab_size=512)
    tokenizer = load(path, config=given)[1]
    if layout == "official_flax":
        inside = load(tmp_path, config=given)[1]
        assert inside is not None and inside.vocab_size == 512
        assert tokenizer is not None and tokenizer.vocab_size == 512
        return
    shutil.move(path / "model.pt", tmp_path / "2b.pt")
    for place in (tmp_path, tmp_path / "2b.pt"):
        tokenizer = load(place, config=given)[1]
        assert tokenizer is not None and tokenizer.vocab_size == 512


@official_formats
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"post_norms": True}, "post_norms is True, must be False"),
        ({"mlp_width": 0}, "mlp_width is 0, must be 'positive'"),
        ({"num_gate_blocks": 2}, "num_gate_blocks is 2, must be 3"),
        ({"embedding_scale": 24**0.5}, "is 4.89.*must be 1.0 or 4.90"),
        ({"block_pattern": ("global_attention",)}, "global_attention in block_pattern"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3, must be 1"),
        ({"conv_width": 3}, "conv_width is 3"),
        ({"attention_bias": False}, "attention_bias is False"),
    ],
)
def test_what_the_official_package_cannot_hold(layout, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "saved", model(**fields), None, format=layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["metadata", "empty", "data", "store"])
def test_damaged_orbax_directories(damage, tmp_path):
    path = tmp_path / "saved"
    save(path, model(), None, format="official_flax")
    if damage == "metadata":
        (path / "_METADATA").write_text("no json")
        message = "is not Orbax metadata"
    elif damage == "empty":
        (path / "_METADATA").write_text(json.dumps({"tree_metadata": {}}))
        message = "missing: embedder.embedding"
    elif damage == "data":
        for file in (path / "d").iterdir():
            file.write_bytes(file.read_bytes()[:-9])
        message = "is damaged: cannot read params"
    else:
        shutil.rmtree(path / "d")
        message = "is damaged: cannot read params"
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_state_dict_that_pytorch_saved():
    expected = load_file(HAWK / "torch_state_dict.safetensors")
    sources = read_state_dict(STATE_DICT, slicing_axis)
    assert len(sources) == 5
    for name, source in sources.items():
        array = expected[name]
        if source.dtype == jnp.bfloat16:
            array = array.astype(jnp.bfloat16)
        np.testing.assert_array_equal(source.load(), array)
        end = source.shape[source.axis]
        part = source.read(end // 2, end)
        expected_part = np.take(array, range(end // 2, end), source.axis)
        np.testing.assert_array_equal(part, expected_part)


def test_names_and_tensors_of_the_official_state_dict(tmp_path):
    golden = load_golden(HAWK)
    expected = load_file(HAWK / "torch_state_dict.safetensors")
    save(tmp_path / "saved", golden, None, format="official_pytorch")
    written = read_state_dict(tmp_path / "saved" / "model.pt", slicing_axis)
    assert set(written) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name].load(), array, err_msg=name)
    write_state_dict(
        tmp_path / "theirs.pt",
        {name: array_source(jnp.asarray(array)) for name, array in expected.items()},
    )
    loaded, _ = load(tmp_path / "theirs.pt", config=golden.config)
    assert_same_parameters(loaded, golden)


@needs_torch
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pytorch_reads_what_is_written(dtype, mapped, tmp_path):
    import torch

    save(tmp_path / "saved", model(dtype=dtype), None, format="official_pytorch")
    file = tmp_path / "saved" / "model.pt"
    theirs = torch.load(file, weights_only=True, mmap=mapped)
    ours = read_state_dict(file, slicing_axis)
    assert list(theirs) == list(ours)
    for name, tensor in theirs.items():
        assert str(tensor.dtype) == f"torch.{dtype}"
        assert tensor.data_ptr() % RECORD_ALIGNMENT == 0 or not mapped
        np.testing.assert_array_equal(tensor.float().numpy(), ours[name].load())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_state_dict_file_is_a_sound_archive(dtype, tmp_path):
    array = np.arange(12, dtype=dtype).reshape(3, 4)
    source = TensorSource((3, 4), np.dtype(dtype), 0, lambda a, b: array[a:b])
    write_state_dict(tmp_path / "a.pt", {"x": source, "y": source.transposed()})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
    written = read_state_dict(tmp_path / "a.pt", slicing_axis)
    np.testing.assert_array_equal(written["x"].load(), array)
    np.testing.assert_array_equal(written["y"].load(), array.T)


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def archive_of(file, pickled, name="model/data.pkl", **other):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, pickled)
        for record, content in other.items():
            archive.writestr(f"model/{record}", content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "not a zip file"),
        ("text", "not a zip file"),
        ("pickle", "not a zip file"),
        ("harmful", "it holds posix.mkdir"),
        ("list", "no dictionary of tensors"),
        ("number", "'step' is not a tensor"),
        ("nested", "'model' is not a tensor"),
        ("other archive", "not enough values"),
        ("big-endian", "it is big-endian"),
        ("truncated", "not a zip file"),
        ("storage", "embedder.input_embedding has no place in it"),
        ("cut", "has no place in it"),
    ],
)
def test_a_file_that_is_no_state_dict(kind, message, tmp_path):
    file = tmp_path / "model.pt"
    contents = {"list": [1, 2], "number": {"step": 3}, "nested": {"model": {}}}
    if kind in contents:
        archive_of(file, pickle.dumps(contents[kind]))
    elif kind == "harmful":
        archive_of(file, pickle.dumps({"a": Harmful(tmp_path / "made")}))
    elif kind == "other archive":
        archive_of(file, b"", name="notes.txt")
    elif kind == "big-endian":
        archive_of(file, pickle.dumps({}), byteorder="big")
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "truncated":
        file.write_bytes(STATE_DICT.read_bytes()[:-500])
    elif kind in ("storage", "cut"):
        with zipfile.ZipFile(STATE_DICT) as archive:
            pickled = archive.read("state_dict/data.pkl")
        size = 4 if kind == "cut" else 0
        archive_of(file, pickled, **{f"data/{key}": bytes(size) for key in range(9)})
    else:
        file.write_bytes(b"no pickle" if kind == "text" else b"")
    with pytest.raises(ValueError, match="is not a PyTorch state dict") as error:
        load(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


FOREIGN = {
    "transformer.wte.weight": (8, 4),
    "embedder.input_embedding": (8,),
    "backbone.layers.0.mixer.proj_q.kernel": (4, 4),
    "blocks.0.mlp_block.ffw_down.kernel": (),
}
"""Names and shapes that look a little like the official ones."""


@official_formats
@pytest.mark.parametrize("names", [*FOREIGN, None])
def test_tensors_of_another_model(layout, names, tmp_path):
    shapes = FOREIGN if names is None else {names: FOREIGN[names]}
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    path = tmp_path / "other"
    if layout == "official_flax":
        with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, {"params": arrays})
    else:
        path = path.with_suffix(".pt")
        sources = {
            name: array_source(jnp.atleast_1d(array)) for name, array in arrays.items()
        }
        write_state_dict(path, sources)
    with pytest.raises(ValueError, match="holds no model of the official") as error:
        load(path)
    message = str(error.value)
    assert f"not among its {len(shapes)} tensors (" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="do not fit its config"):
        load(path, config=config())


def test_state_dicts_that_cannot_be_loaded(tmp_path):
    with zipfile.ZipFile(STATE_DICT) as archive:
        pickled = archive.read("state_dict/data.pkl")
    archive_of(tmp_path / "a.pt", pickled.replace(b"BFloat16Storage", b"LongStorage"))
    with pytest.raises(ValueError, match=r"is stored as long"):
        load(tmp_path / "a.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"several state dicts \(a.pt, b.pth\)"):
        load(tmp_path)
