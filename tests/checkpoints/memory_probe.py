"""Prints, as JSON, how far the memory of a process grows while it loads and saves.

Run as `python memory_probe.py make|load|save FORMAT DIRECTORY LAYERS [DTYPE TARGET]`.
The peak is that of the resident set, mapped files included.
"""

import json
import sys
import time
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from recurrentgemma.checkpoints import FORMATS, load, named_parameters, save
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig
from recurrentgemma.griffin import Griffin


def config(layers: int) -> GriffinConfig:
    return GriffinConfig(
        vocab_size=16384,
        width=1024,
        mlp_width=3072,
        num_layers=layers,
        num_heads=8,
        head_dim=128,
        lru_width=1024,
        num_gate_blocks=8,
        embedding_scale=32.0,
        logits_soft_cap=30.0,
    )


def make(layout: str, directory: Path, layers: int, dtype: str) -> dict:
    """Writes a random checkpoint without ever having the model."""
    described = nnx.eval_shape(lambda: Griffin(config(layers), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def source(shape: tuple[int, ...]) -> TensorSource:
        def read(start: int, stop: int) -> np.ndarray:
            values = rng.standard_normal((stop - start, *shape[1:]), np.float32)
            return (0.02 * values).astype(dtype)

        return TensorSource(shape, np.dtype(dtype), 0, read)

    parameters = named_parameters(described)
    tensors = {name: source(leaf.shape) for name, leaf in parameters.items()}
    directory.mkdir(parents=True)
    FORMATS[layout].write(directory, config(layers), tensors, None)
    return {"bytes": sum(f.stat().st_size for f in directory.iterdir())}


def shardings(target: str):
    mesh = jax.make_mesh((8,), ("model",))

    def choose(name: str, shape: tuple[int, ...]) -> NamedSharding:
        axes = {"rows": 0, "columns": len(shape) - 1}
        divisible = [axis for axis in (axes[target],) if shape[axis] % 8 == 0]
        spec = [None] * len(shape)
        for axis in divisible:
            spec[axis] = "model"
        return NamedSharding(mesh, PartitionSpec(*spec))

    if target == "replicated":
        return NamedSharding(mesh, PartitionSpec())
    return None if target == "host" else choose


def memory(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def probe(
    mode: str, layout: str, directory: Path, small: Path, dtype: str, target: str
) -> dict:
    # A first load brings in everything that is loaded lazily.
    first, _ = load(small, param_dtype=dtype, sharding=shardings(target))
    save(small.with_name("small_again"), first, None, format=layout)
    del first
    before, start = memory("VmRSS"), time.perf_counter()
    model, _ = load(directory, param_dtype=dtype, sharding=shardings(target))
    if mode == "save":
        before, start = memory("VmRSS"), time.perf_counter()
        save(directory.with_name("again"), model, None, format=layout)
    seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(model)
    on_devices = sum(
        {
            s.data.unsafe_buffer_pointer(): s.data.nbytes
            for s in leaf.addressable_shards
        }[p]
        for leaf in leaves
        for p in {s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards}
    )
    return {
        "growth": memory("VmHWM") - before,
        "on_devices": on_devices,
        "model": sum(leaf.nbytes for leaf in leaves),
        "largest": max(leaf.nbytes for leaf in leaves),
        "seconds": seconds,
    }


if __name__ == "__main__":
    mode, layout, directory, layers, dtype, *rest = sys.argv[1:]
    if mode == "make":
        result = make(layout, Path(directory), int(layers), dtype)
    else:
        small = Path(directory).with_name("small")
        result = probe(mode, layout, Path(directory), small, dtype, rest[0])
    print(json.dumps(result))
