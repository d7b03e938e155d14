"""Models and data of `tests/golden/deepmind`, computed with recurrentgemma 1.0.1."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from recurrentgemma import Griffin, GriffinConfig, Runtime

GOLDEN = pathlib.Path(__file__).parent / "golden"
DEEPMIND_CASES = sorted(path.name for path in (GOLDEN / "deepmind").iterdir())

_RENAMED = {
    "embedder/input_embedding": "embedder/embedding",
    "recurrent_block/": "mixer/",
    "attention_block/": "mixer/",
    "mlp_block/": "mlp/",
    "a_gate/": "recurrence_gate/",
    "conv_1d/b": "conv_1d/bias",
    "conv_1d/w": "conv_1d/kernel",
    "gate/b": "gate/bias",
    "gate/w": "gate/kernel",
    "proj_final/": "proj_out/",
    "ffw_down/": "down/",
}


def read_config(folder: pathlib.Path) -> GriffinConfig:
    """The config of a golden case."""
    fields = json.loads((folder / "config.json").read_text())
    width, heads = fields["width"], fields["num_heads"]
    names = {"recurrent": "recurrent", "attention": "local_attention"}
    scale = float(jnp.bfloat16(width**0.5))
    return GriffinConfig(
        vocab_size=fields["vocab_size"],
        width=width,
        mlp_width=fields["mlp_expanded_width"],
        num_layers=len(fields["block_types"]),
        block_pattern=tuple(names[kind] for kind in fields["block_types"]),
        num_heads=heads,
        head_dim=width // heads,
        attention_window=fields["attention_window_size"],
        lru_width=fields["lru_width"],
        num_gate_blocks=heads,
        embedding_scale=scale if fields["embeddings_scale_by_sqrt_dim"] else 1.0,
        logits_soft_cap=fields["logits_soft_cap"] or None,
    )


def native_names(official: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters (or their gradients) under the names of `Griffin`, joined by dots."""
    native = {}
    for name, value in official.items():
        if "ffw_up" in name:
            place, leaf = name.split("ffw_up/")
            leaf = {"w": "kernel", "b": "bias"}[leaf]
            for half, part in zip(("gate", "up"), value, strict=True):
                part = part.reshape(part.shape[-1]) if leaf == "bias" else part
                native[f"{place}{half}/{leaf}".replace("mlp_block", "mlp")] = part
            continue
        for old, new in _RENAMED.items():
            if name.endswith(old) or old.endswith("/"):
                name = name.replace(old, new)
        native[name] = value
    return {name.replace("/", "."): value for name, value in native.items()}


def named_leaves(tree) -> dict[str, jnp.ndarray]:
    """The arrays of a model, or of its gradient, by dotted name."""
    flat = nnx.to_flat_state(nnx.state(tree))
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}


def load_golden(folder: pathlib.Path, runtime: Runtime = Runtime()) -> Griffin:
    """The model of a golden case; every parameter is replaced."""
    config = read_config(folder)
    model = nnx.eval_shape(lambda: Griffin(config, rngs=nnx.Rngs(0), runtime=runtime))
    values = native_names(load_file(folder / "params.safetensors"))
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    assert {".".join(map(str, path)) for path in flat} == set(values)
    for path, leaf in flat.items():
        value = values[".".join(map(str, path))]
        assert leaf.shape == value.shape, path
        flat[path] = leaf.replace(jnp.asarray(value))
    nnx.update(model, nnx.from_flat_state(flat))
    return model


def load_data(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a golden case."""
    with np.load(folder / "data.npz") as data:
        return {name: data[name] for name in data.files}
