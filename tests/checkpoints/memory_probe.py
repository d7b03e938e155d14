"""Prints, as JSON, how far the memory of a process grows while it loads and saves.

    python memory_probe.py FORMAT DIRECTORY DTYPE TARGET [save]

The peak is that of the resident set, mapped files included.
"""

import gc
import json
import shutil
import sys
import time
from pathlib import Path

import jax

VIRTUAL_DEVICES = 8

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from recurrentgemma.checkpoints import FORMATS, load, save
from recurrentgemma.checkpoints.parameters import parameter_shapes
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig

STORED_DTYPE = np.dtype(np.float32)


def config(layers: int) -> GriffinConfig:
    """54 MB a layer and 67 MB of embedding in float32; no layers are a tiny model."""
    width = 1024 if layers else 64
    return GriffinConfig(
        vocab_size=16 * width,
        width=width,
        mlp_width=3 * width,
        num_layers=layers or 3,
        num_heads=8,
        head_dim=width // 8,
        lru_width=width,
        num_gate_blocks=8,
        embedding_scale=float(jnp.bfloat16(width**0.5)),
        logits_soft_cap=30.0,
    )


def make(layout: str, folder: Path, layers: int) -> None:
    """Writes the two random float32 checkpoints that the probe reads."""
    write_random(layout, folder / "tiny", 0)
    write_random(layout, folder / "large", layers)


def write_random(layout: str, directory: Path, layers: int) -> None:
    """A random checkpoint, without ever having the model."""
    made = config(layers)
    rng = np.random.default_rng(0)

    def source(shape: tuple[int, ...]) -> TensorSource:
        def read(start: int, stop: int) -> np.ndarray:
            return rng.random((stop - start, *shape[1:]), STORED_DTYPE)

        return TensorSource(shape, STORED_DTYPE, 0, read)

    shapes = parameter_shapes(made)
    tensors = {name: source(shape) for name, shape in shapes.items()}
    directory.mkdir()
    FORMATS[layout].write(directory, made, tensors, None)


def shardings(target: str):
    mesh = jax.make_mesh((VIRTUAL_DEVICES,), ("model",))
    if target == "host":
        return None
    if target == "replicated":
        return NamedSharding(mesh, PartitionSpec())

    def choose(name: str, shape: tuple[int, ...]) -> NamedSharding:
        axis = {"rows": 0, "columns": len(shape) - 1}[target]
        spec: list[str | None] = [None] * len(shape)
        if shape[axis] % VIRTUAL_DEVICES == 0:
            spec[axis] = "model"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return choose


def memory(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def probe(layout: str, directory: Path, dtype: str, target: str, saves: bool) -> dict:
    def load_and_save(name: str):
        start = time.perf_counter()
        model, _ = load(directory / name, param_dtype=dtype, sharding=shardings(target))
        loaded, seconds = memory("VmHWM"), time.perf_counter() - start
        if saves:
            save(directory / "again", model, None, format=layout)
            shutil.rmtree(directory / "again")
        return model, loaded, seconds

    # A first round brings in everything that is loaded lazily.
    load_and_save("tiny")
    gc.collect()
    before = memory("VmRSS")
    model, loaded, seconds = load_and_save("large")
    leaves = jax.tree.leaves(model)
    # Devices of the CPU may share the memory of a replicated array.
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for leaf in leaves
        for shard in leaf.addressable_shards
    }
    return {
        "load_growth": loaded - before,
        "save_growth": memory("VmHWM") - before,
        "on_devices": sum(buffers.values()),
        "model": sum(leaf.nbytes for leaf in leaves),
        "largest": max(leaf.nbytes for leaf in leaves),
        "largest_stored": max(leaf.size for leaf in leaves) * STORED_DTYPE.itemsize,
        "load_seconds": seconds,
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", VIRTUAL_DEVICES)
    layout, directory, dtype, target, *options = sys.argv[1:]
    result = probe(layout, Path(directory), dtype, target, "save" in options)
    print(json.dumps(result))
