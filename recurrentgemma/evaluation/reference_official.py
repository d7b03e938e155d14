"""Hidden states of each layer as the official recurrentgemma (PyPI, Flax) computes them.

    python -P reference_official.py REQUEST

Runs in an environment of its own (see `layer_states.py`, which writes the request) and
imports nothing of this package.
"""

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint

# By name: here `recurrentgemma` is the other package.
recurrentgemma = importlib.import_module("recurrentgemma.jax")


def make_model(config: dict, dtype: str):
    kinds = recurrentgemma.TemporalBlockType
    by_name = {
        "recurrent": kinds.RECURRENT,
        "local_attention": kinds.ATTENTION,
    }
    pattern = config["block_pattern"]
    types = [pattern[i % len(pattern)] for i in range(config["num_layers"])]
    made = recurrentgemma.GriffinConfig(
        vocab_size=config["vocab_size"],
        width=config["width"],
        mlp_expanded_width=config["mlp_width"],
        num_heads=config["num_heads"],
        lru_width=config["lru_width"],
        block_types=tuple(by_name[kind] for kind in types),
        embeddings_scale_by_sqrt_dim=config["embedding_scale"] != 1,
        attention_window_size=config["attention_window"],
        logits_soft_cap=config["logits_soft_cap"] or 0.0,
    )
    return recurrentgemma.Griffin(
        made, gradient_checkpointing=False, dtype=jnp.dtype(dtype)
    )


def read_parameters(checkpoint: str, dtype: str) -> dict:
    folder = Path(checkpoint)
    if not (folder / "_METADATA").exists():
        folder = next(folder.glob("*/_METADATA")).parent
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder.absolute())
    params = restored.get("params", restored)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.dtype(dtype)), params)


def states(request: dict) -> dict[str, jax.Array]:
    config, dtype = request["config"], request["dtype"]
    model = make_model(config, dtype)
    params = read_parameters(request["checkpoint"], dtype)
    tokens = jnp.asarray(request["tokens"], jnp.int32)[None]
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

    @jax.jit
    def run(params):
        return model.apply(
            {"params": params},
            tokens,
            positions,
            return_cache=False,
            capture_intermediates=lambda _, method: method in ("__call__", "encode"),
            mutable=["intermediates"],
        )

    (logits, _), captured = run(params)
    captured = captured["intermediates"]
    found = {"embedding": captured["embedder"]["encode"][0]}
    for i in range(config["num_layers"]):
        found[f"layer {i}"] = captured[f"blocks.{i}"]["__call__"][0][0]
    found["final norm"] = captured["final_norm"]["__call__"][0]
    return {**found, "logits": logits}


def main(request_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    found = {
        name: np.asarray(value[0], np.float32)
        for name, value in states(request).items()
    }
    names = "recurrentgemma", "jax", "flax"
    versions = {name: importlib.metadata.version(name) for name in names}
    found["versions"] = np.asarray(json.dumps(versions))
    np.savez(request["output"], allow_pickle=False, **found)


if __name__ == "__main__":
    main(sys.argv[1])
