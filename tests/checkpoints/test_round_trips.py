"""What is saved is what is loaded, bit for bit, in every format."""

import importlib.resources
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.flax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recurrentgemma import Runtime, Tokenizer
from recurrentgemma.checkpoints import (
    detect_format,
    hugging_face,
    load,
    named_parameters,
    parameter_dtype,
    read_config,
    save,
    tensors,
)
from recurrentgemma.griffin import stack_layers
from tests.checkpoints.checkpoints import (
    BYTES_AT_ONCE,
    assert_same_files,
    assert_same_parameters,
    config,
    every_format,
    fields_for,
    model,
    safetensors_formats,
)

TOKENIZER = Path(__file__).parents[1] / "golden" / "sampler" / "tokenizer.model"


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", BYTES_AT_ONCE)


@every_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_pattern": ("recurrent",)},
        {"block_pattern": ("local_attention",), "num_kv_heads": 3},
        {"num_layers": 5, "conv_width": 3, "mlp_width": 20},
    ],
    ids=["griffin", "hawk", "attention", "odd"],
)
def test_round_trip(layout, dtype, fields, tmp_path):
    original = model(dtype=dtype, **fields_for(layout, fields))
    save(tmp_path / "saved", original, None, format=layout)
    assert detect_format(tmp_path / "saved") == layout
    loaded, tokenizer = load(tmp_path / "saved", param_dtype=dtype)
    assert tokenizer is None
    assert loaded.config == original.config
    assert read_config(tmp_path / "saved") == original.config
    assert_same_parameters(loaded, original)


@every_format
def test_mixed_dtypes_round_trip_through_files_alone(layout, tmp_path):
    save(tmp_path / "float32", model(), None, format=layout)
    runtime = Runtime(compute_dtype="bfloat16")
    mixed, _ = load(tmp_path / "float32", runtime=runtime)
    save(tmp_path / "first", mixed, None, format=layout)
    again, _ = load(tmp_path / "first", runtime=runtime)
    assert_same_parameters(again, mixed)
    save(tmp_path / "second", again, None, format=layout)
    assert_same_files(layout, tmp_path / "second", tmp_path / "first")


@pytest.mark.parametrize("mlp_width", [0, 20])
def test_every_architecture_round_trips_in_the_native_format(mlp_width, tmp_path):
    fields = {
        "mlp_width": mlp_width,
        "block_pattern": ("local_attention", "global_attention"),
        "post_norms": True,
        "mlp_bias": False,
        "attention_bias": False,
        "attention_soft_cap": 50.0,
        "query_scale": 0.1,
        "rope_fraction": 1.0,
        "logits_soft_cap": None,
    }
    original = model(**fields)
    save(tmp_path / "saved", original, None)
    loaded, _ = load(tmp_path / "saved")
    assert loaded.config == original.config
    assert_same_parameters(loaded, original)


@every_format
def test_stacked_layers_are_saved_one_by_one(layout, tmp_path):
    original = model(num_layers=8)
    save(tmp_path / "saved", stack_layers(original), None, format=layout)
    assert_same_parameters(load(tmp_path / "saved")[0], original)


def test_shards_with_an_index(tmp_path, monkeypatch):
    original = model()
    monkeypatch.setattr(hugging_face, "MAX_SHARD_BYTES", 20_000)
    save(tmp_path / "saved", original, None, format="hugging_face")
    index = json.loads((tmp_path / "saved" / hugging_face.INDEX_FILE).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert files | {hugging_face.INDEX_FILE, "config.json"} == {
        file.name for file in (tmp_path / "saved").iterdir()
    }
    assert index["metadata"]["total_size"] == sum(
        leaf.nbytes for leaf in jax.tree.leaves(original)
    )
    sizes = [(tmp_path / "saved" / file).stat().st_size for file in files]
    assert max(sizes) < 20_000 + 4096
    assert_same_parameters(load(tmp_path / "saved")[0], original)


@safetensors_formats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_library_reads_our_files_and_we_read_its(layout, dtype, tmp_path):
    original = model(dtype=dtype)
    save(tmp_path / "saved", original, None, format=layout)
    file = tmp_path / "saved" / "model.safetensors"
    theirs = safetensors.flax.load_file(file)
    embedding = {"native": "embedder.embedding"}.get(
        layout, "model.embed_tokens.weight"
    )
    assert theirs[embedding].dtype == dtype
    np.testing.assert_array_equal(theirs[embedding], original.embedder.embedding[...])
    file.unlink()
    safetensors.flax.save_file(theirs, file)
    assert_same_parameters(load(tmp_path / "saved", param_dtype=dtype)[0], original)


@every_format
def test_the_tokenizer_comes_along(layout, tmp_path):
    tokenizer = Tokenizer(TOKENIZER)
    save(tmp_path / "a", model(vocab_size=512), tokenizer, format=layout)
    _, loaded = load(tmp_path / "a")
    assert loaded is not None
    assert loaded.model_bytes == tokenizer.model_bytes
    save(tmp_path / "b", model(vocab_size=600), None, format=layout)
    for given in (tokenizer, TOKENIZER, str(TOKENIZER), tokenizer.model_bytes):
        assert load(tmp_path / "b", tokenizer=given)[1].vocab_size == 512


def test_runtime_and_config_are_those_given(tmp_path):
    save(tmp_path / "saved", model(), None)
    runtime = Runtime(linear_scan="reference", remat=True)
    given = config(attention_window=3)
    loaded, _ = load(tmp_path / "saved", config=given, runtime=runtime)
    assert loaded.runtime == runtime and loaded.config == given


def test_parameter_dtypes(tmp_path):
    save(tmp_path / "saved", model(dtype="float16"), None)
    runtime = Runtime(compute_dtype="bfloat16")
    loaded, _ = load(tmp_path / "saved", runtime=runtime)
    kept_float32 = {"scale", "bias", "a_param"}
    for name, array in named_parameters(loaded).items():
        float32 = name.split(".")[-1] in kept_float32 or "conv_1d" in name
        assert array.dtype == ("float32" if float32 else "bfloat16"), name
        assert parameter_dtype(name, config(), runtime, "float16") == "float16"
    whole, _ = load(tmp_path / "saved", runtime=runtime, param_dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {np.dtype("float32")}


def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"))


def by_last_axis(name: str, shape: tuple[int, ...]) -> NamedSharding:
    spec = [None] * len(shape)
    for axis in range(len(shape) - 1, -1, -1):
        if shape[axis] % 4 == 0:
            spec[axis] = "model"
            break
    return NamedSharding(mesh(), PartitionSpec(*spec))


def by_both_axes(name: str, shape: tuple[int, ...]) -> NamedSharding:
    whole = len(shape) == 2 and shape[0] % 2 == 0 and shape[1] % 4 == 0
    spec = ("data", "model") if whole else [None] * len(shape)
    return NamedSharding(mesh(), PartitionSpec(*spec))


SHARDINGS = {
    "device": lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[5]),
    "replicated": lambda _: NamedSharding(mesh(), PartitionSpec()),
    "last_axis": lambda _: by_last_axis,
    "both_axes": lambda _: by_both_axes,
    "by_name": lambda shapes: {n: by_last_axis(n, s) for n, s in shapes.items()},
    "nested": lambda shapes: {
        "embedder": {"embedding": by_both_axes("", shapes["embedder.embedding"])},
        **{
            n: by_last_axis(n, s)
            for n, s in shapes.items()
            if n != "embedder.embedding"
        },
    },
}


@every_format
@pytest.mark.parametrize("kind", SHARDINGS)
def test_sharded(layout, kind, tmp_path):
    original = model()
    save(tmp_path / "saved", original, None, format=layout)
    parameters = named_parameters(original)
    shapes = {name: leaf.shape for name, leaf in parameters.items()}
    sharding = SHARDINGS[kind](shapes)
    loaded, _ = load(tmp_path / "saved", sharding=sharding)
    assert_same_parameters(loaded, original)
    for name, leaf in named_parameters(loaded).items():
        expected = sharding
        if isinstance(sharding, dict):
            nested = sharding.get("embedder", {}).get("embedding")
            expected = sharding.get(name, nested)
        elif callable(sharding):
            expected = sharding(name, leaf.shape)
        assert leaf.sharding == expected, name
        for shard in leaf.addressable_shards:
            whole = np.asarray(parameters[name])
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    save(tmp_path / "again", loaded, None, format=layout)
    assert_same_files(layout, tmp_path / "again", tmp_path / "saved")


def test_loaded_parameters_survive_the_files_and_donation(tmp_path):
    original = model()
    save(tmp_path / "saved", original, None)
    sharding = NamedSharding(mesh(), PartitionSpec())
    loaded, _ = load(tmp_path / "saved", sharding=sharding)
    for file in (tmp_path / "saved").iterdir():
        file.write_bytes(b"")
    add = jax.jit(lambda m: jax.tree.map(lambda x: x + 1, m), donate_argnums=0)
    added = add(loaded)
    expected = jax.tree.map(lambda x: x + 1, original)
    for actual, array in zip(*map(jax.tree.leaves, (added, expected)), strict=True):
        for shard in actual.addressable_shards:
            np.testing.assert_array_equal(shard.data, array)


def test_bundled_names_win_over_directories(tmp_path, monkeypatch):
    for place, seed in (("assets/tiny", 0), ("tiny", 1)):
        save(tmp_path / place, model(seed=seed), None)
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    monkeypatch.chdir(tmp_path)
    assert_same_parameters(load("tiny")[0], model())
    assert_same_parameters(load("./tiny")[0], model(seed=1))
    assert_same_parameters(load(Path("tiny").absolute())[0], model(seed=1))
