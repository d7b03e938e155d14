"""What is wrong with a checkpoint is said once, clearly, as a ValueError."""

import json
import shutil
import struct

import pytest

from recurrentgemma import PRESETS, Tokenizer
from recurrentgemma.checkpoints import hugging_face, load, read_config, save
from tests.checkpoints.checkpoints import (
    FORMATS,
    config,
    every_format,
    model,
    safetensors_formats,
)
from tests.checkpoints.test_round_trips import TOKENIZER

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of each format; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("saved")
    for layout in FORMATS:
        save(folder / layout, model(), None, format=layout)
    return folder


@pytest.fixture
def checkpoint(saved, layout, tmp_path):
    return shutil.copytree(saved / layout, tmp_path / layout)


def edit_json(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_header(file, change):
    """Rewrites a safetensors file with a changed header."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size :])


@safetensors_formats
def test_missing_file(checkpoint):
    (checkpoint / MODEL).unlink()
    with pytest.raises(ValueError, match=f"Cannot read .*{MODEL}: No such file"):
        load(checkpoint)


@safetensors_formats
@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_file(checkpoint, size):
    content = (checkpoint / MODEL).read_bytes()
    (checkpoint / MODEL).write_bytes(content[:size])
    with pytest.raises(ValueError, match="is truncated|is not a safetensors file"):
        load(checkpoint)


@safetensors_formats
@pytest.mark.parametrize(
    "content", [b"\x10" + bytes(7) + b"no json here....", b"\x02" + bytes(7) + b"[]"]
)
def test_a_file_that_is_no_safetensors(checkpoint, content):
    (checkpoint / MODEL).write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file|do not fit"):
        load(checkpoint)


@safetensors_formats
def test_damaged_headers(checkpoint):
    whole = (checkpoint / MODEL).read_bytes()
    for field, value, message in [
        ("data_offsets", [0, 8], "has no place"),
        ("data_offsets", "ab", "has no place"),
        ("data_offsets", [0, 8, 9], "has no place"),
        ("shape", None, "has no place"),
        ("shape", [40.0, 24.0], "has no place"),
        ("dtype", "I8", "is stored as I8; expected one of F64, F32, F16, BF16"),
    ]:
        (checkpoint / MODEL).write_bytes(whole)

        def change(header, field=field, value=value):
            name = next(name for name in header if "embed" in name)
            header[name][field] = value

        edit_header(checkpoint / MODEL, change)
        with pytest.raises(ValueError, match=message):
            load(checkpoint)


def test_everything_that_does_not_fit_is_in_one_message(saved, tmp_path):
    path = shutil.copytree(saved / "hugging_face", tmp_path / "copy")

    def change(header):
        header["model.layers.0.extra"] = header.pop("model.final_norm.weight")
        gate = header.pop("model.layers.1.mlp_block.gate_proj.weight")
        header["model.embed_tokens.bias"] = gate
        kernel = header["model.layers.2.temporal_block.q_proj.weight"]
        kernel["shape"] = kernel["shape"][::-1] + [1]

    edit_header(path / MODEL, change)
    with pytest.raises(ValueError, match="do not fit its config") as error:
        load(path)
    lines = {line.strip() for line in str(error.value).splitlines()[1:]}
    assert lines == {
        "missing: final_norm.scale (model.final_norm.weight)",
        "missing: blocks.1.mlp.gate.kernel (model.layers.1.mlp_block.gate_proj.weight)",
        "unexpected: model.layers.0.extra",
        "unexpected: model.embed_tokens.bias",
        (
            "wrong shape: blocks.2.mixer.proj_q.kernel "
            "(model.layers.2.temporal_block.q_proj.weight) is [1, 24, 24], expected "
            "[24, 24]"
        ),
    }


@every_format
def test_a_config_that_contradicts_the_tensors(checkpoint):
    with pytest.raises(ValueError, match="do not fit") as error:
        load(checkpoint, config=config(mlp_width=48, attention_window=9))
    message = str(error.value)
    for i in range(3):
        assert f"wrong shape: blocks.{i}.mlp.down.kernel" in message
        assert "is [32, 24], expected [48, 24]" in message
    assert "config= says mlp_width is 48, the checkpoint 32" in message
    assert "config= says attention_window is 9, the checkpoint 6" in message


@every_format
def test_a_stored_config_that_contradicts_the_tensors(checkpoint, layout):
    content = json.loads((checkpoint / "config.json").read_text())
    if layout == "hugging_face":
        content["intermediate_size"] = 96
    else:
        content["config"]["mlp_width"] = 48
    (checkpoint / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="do not fit its config") as error:
        load(checkpoint)
    assert "is [32, 24], expected [48, 24]" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 4}, "missing: blocks.3.mixer.linear_x.kernel"),
        ({"width": 0}, "width: expected an integer of at least 1"),
        ({"depth": 3}, "unknown fields"),
        ({"width": "wide"}, "width: expected an integer of at least 1"),
    ],
)
def test_a_native_config_that_contradicts(saved, tmp_path, fields, message):
    path = shutil.copytree(saved / "native", tmp_path / "copy")
    stored = json.loads((path / "config.json").read_text())["config"]
    edit_json(path / "config.json", config={**stored, **fields})
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; only 1e-06"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; expected an object"),
        ({"hidden_size": "24"}, "hidden_size is '24'; expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a positive"),
        ({"block_types": ["attention", "mamba"]}, "got 'mamba'"),
        ({"head_dim": "big"}, "config.json: .*head_dim"),
        ({"num_attention_heads": 5}, "lru_width: expected a multiple"),
    ],
)
def test_a_hugging_face_config_that_is_not_supported(saved, tmp_path, fields, message):
    path = shutil.copytree(saved / "hugging_face", tmp_path / "copy")
    edit_json(path / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_hugging_face_config_without_sizes(saved, tmp_path):
    path = shutil.copytree(saved / "hugging_face", tmp_path / "copy")
    (path / "config.json").write_text('{"model_type": "recurrent_gemma"}')
    with pytest.raises(ValueError, match="lacks vocab_size, hidden_size"):
        load(path)


def test_a_newer_format_version(saved, tmp_path):
    path = shutil.copytree(saved / "native", tmp_path / "copy")
    edit_json(path / "config.json", format_version=2)
    with pytest.raises(ValueError, match="format version 2; .* reads 1"):
        load(path)


@pytest.mark.parametrize("damage", ["shard", "index", "elsewhere", "number", "tensor"])
def test_damaged_shards(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(hugging_face, "MAX_SHARD_BYTES", 20_000)
    save(tmp_path / "saved", model(), None, format="hugging_face")
    index = tmp_path / "saved" / hugging_face.INDEX_FILE
    names = json.loads(index.read_text())["weight_map"]
    if damage == "shard":
        (tmp_path / "saved" / names["model.embed_tokens.weight"]).unlink()
        message = "Cannot read .*model-00"
    elif damage == "index":
        index.write_text("{}")
        message = "is not an index of shards"
    elif damage == "elsewhere":
        edit_json(index, weight_map={**names, "a": "../a.safetensors"})
        message = "names a file elsewhere: '../a.safetensors'"
    elif damage == "number":
        edit_json(index, weight_map={"a": 5})
        message = "names a file elsewhere: 5"
    else:
        edit_json(index, weight_map={**names, "a": names["model.embed_tokens.weight"]})
        message = r"names tensors that no shard has: \['a'\]"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "saved")


@pytest.mark.parametrize("content", ["[1]", "no json", '{"a": 1}', None])
def test_a_directory_that_is_no_checkpoint(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    for function in (load, read_config):
        with pytest.raises(ValueError, match="not a (checkpoint|JSON object)"):
            function(tmp_path)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; expected the directory"):
        load(tmp_path / "a.safetensors")


def test_unknown_presets_and_paths():
    with pytest.raises(ValueError, match="Did you mean .*recurrentgemma-2b"):
        load("recurrentgemma-2B")
    with pytest.raises(ValueError, match=r"There is no directory .* 'a/b/c'\.$"):
        load("a/b/c")


def test_a_preset_without_weights_says_what_to_do():
    with pytest.raises(ValueError, match="No weights of 'gemma-2b' are bundled") as e:
        load("gemma-2b")
    assert 'Griffin(PRESETS["gemma-2b"]' in str(e.value).replace("'", '"')
    assert "gemma-2b" in PRESETS


@every_format
def test_a_tokenizer_that_does_not_fit(checkpoint, layout, tmp_path):
    with pytest.raises(ValueError, match="has 512 pieces .* vocabulary has 40"):
        load(checkpoint, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="has 512 pieces .* vocabulary has 40"):
        save(tmp_path / "new", model(), Tokenizer(TOKENIZER), format=layout)
    with pytest.raises(ValueError, match="vocabulary has 768"):
        save(tmp_path / "new", model(vocab_size=768), Tokenizer(TOKENIZER))
    (checkpoint / "tokenizer.model").write_bytes(b"no tokenizer")
    with pytest.raises(ValueError, match="Not a SentencePiece model"):
        load(checkpoint)
    assert not (tmp_path / "new").exists()
