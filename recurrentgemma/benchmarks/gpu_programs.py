"""Programs of one layer, compiled by the real GPU compiler on a machine without a GPU.

`gpu_counts.py` runs this file as a text, in a process where `recurrentgemma` may be an
older checkout: it imports nothing that is newer than the ops. It needs the CUDA plugin
and ptxas, from PyPI, and neither a driver nor a GPU.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recurrentgemma.kernels import linear_scan, local_attention, rg_lru
from recurrentgemma.kernels.linear_scan import linear_scan_gradients
from recurrentgemma.kernels.rg_lru import composed
from recurrentgemma.kernels.rg_lru.gates import Inputs

BATCH, LENGTH, WIDTH = 1, 8192, 2560
HEADS, KEY_HEADS, HEAD_DIM, WINDOW = 10, 1, 256, 2048
"""A layer of recurrentgemma-2b reads 8192 tokens."""
CARDS = {
    "T4": {
        "capability": (7, 5), "architecture": "sm_75", "memory": 15835660288,
        "bandwidth": 320000000000, "cores": 40, "fpus": 64, "clock": 1.59,
        "cache": 4194304, "threads": 1024, "shared": 65536, "optin": 65536,
    },
    "A100": {
        "capability": (8, 0), "architecture": "sm_80", "memory": 42405855232,
        "bandwidth": 1555000000000, "cores": 108, "fpus": 64, "clock": 1.41,
        "cache": 41943040, "threads": 2048, "shared": 167936, "optin": 166912,
    },
    "H100": {
        "capability": (9, 0), "architecture": "sm_90a", "memory": 84942979072,
        "bandwidth": 3350000000000, "cores": 132, "fpus": 128, "clock": 1.98,
        "cache": 52428800, "threads": 2048, "shared": 233472, "optin": 232448,
    },
}  # fmt: skip
"""What NVIDIA publishes of a T4, an A100 of 40 GB and an H100 SXM."""
DESCRIPTION = """
gpu_device_info {{
  name: "{name}" device_memory_size: {memory} memory_bandwidth: {bandwidth}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  l2_cache_size: {cache} threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: {threads} shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  driver_version: "13.0.0" runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" device_description_str: "{name}"
"""


def rg_lru_gradients(*arrays):
    """Gradients of the RG-LRU without a kernel, from its arguments, y and gradients."""
    *inputs, y, y_gradient, last_gradient = arrays
    arguments, upstream = (Inputs(*inputs),), (y_gradient, last_gradient)
    return composed.gradients(arguments, (y, None), upstream, linear_scan="chunked")


def attention(q, k, v, positions):
    """Local attention without a kernel."""
    options = {"cache": None, "window": WINDOW, "scale": HEAD_DIM**-0.5}
    options |= {"soft_cap": None, "implementation": "blocked"}
    return local_attention(q, k, v, positions=positions, **options)[0]


def attention_and_gradients(q, k, v, positions, upstream):
    """The same, and the gradients of q, k and v."""
    out, pull_back = jax.vjp(partial(attention, positions=positions), q, k, v)
    return out, pull_back(upstream)


def programs(dtype, array):
    """Functions by name, with the shapes of their arguments."""
    x, state = array((BATCH, LENGTH, WIDTH), dtype), array((BATCH, WIDTH), "float32")
    positions = array((BATCH, LENGTH), "int32")
    a_param = array((WIDTH,), "float32")
    q = array((BATCH, LENGTH, HEADS, HEAD_DIM), dtype)
    k = array((BATCH, LENGTH, KEY_HEADS, HEAD_DIM), dtype)
    chunked, composed = {"implementation": "chunked"}, {"linear_scan": "chunked"}
    logits = (x, x, x, a_param, positions, state)
    return {
        "linear_scan": (partial(linear_scan, **chunked), (x, x, state)),
        "linear_scan gradient": (
            partial(linear_scan_gradients, **chunked),
            (x, state, x, x, state),
        ),
        "rg_lru": (partial(rg_lru, **composed), logits),
        "rg_lru gradient": (rg_lru_gradients, (*logits, x, x, state)),
        "attention": (attention, (q, k, k, positions)),
        "attention and gradient": (attention_and_gradients, (q, k, k, positions, q)),
    }


def device_of(card):
    """A device of a card of `CARDS` that is not here."""
    known = dict(CARDS[card])
    major, minor = known.pop("capability")
    accelerated = known.pop("architecture").endswith("a")
    known["extension"] = (
        "feature_extension: ACCELERATED_FEATURES" if accelerated else ""
    )
    topology = topologies.get_topology_desc(
        card,
        platform="cuda",
        target_config=DESCRIPTION.format(name=card, major=major, minor=minor, **known),
        topology="1x1x1",
    )
    return topology.devices[0]


def write_programs(card: str, dtypes: list[str], folder: str) -> None:
    """Writes what the compiler makes of each program, as `DTYPE NAME.txt`."""
    mesh = Mesh(np.array([device_of(card)]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    array = partial(jax.ShapeDtypeStruct, sharding=sharding)
    for dtype in dtypes:
        for name, (function, shapes) in programs(jnp.dtype(dtype), array).items():
            compiled = jax.jit(function).lower(*shapes).compile()
            Path(folder, f"{dtype} {name}.txt").write_text(compiled.as_text() or "")
