"""Compiles the GPU kernels for an H100 that is not there, and reports what it uses.

Run as a program with a directory to dump to, because XLA reads its flags once. Needs
the CUDA plugin and ptxas from PyPI, neither a driver nor a GPU. Prints one JSON object.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nvidia.cuda_nvcc

DUMP = Path(sys.argv[1])
CUDA = Path(nvidia.cuda_nvcc.__path__[0])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_gpu_cuda_data_dir={CUDA}"
os.environ["PATH"] += f":{CUDA / 'bin'}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recurrentgemma.kernels.linear_scan import pallas_gpu as linear_scan
from recurrentgemma.kernels.rg_lru import pallas_gpu as rg_lru
from recurrentgemma.kernels.rg_lru.gates import Inputs

# What NVIDIA publishes of the H100 SXM.
H100 = """
gpu_device_info {
  name: "H100" device_memory_size: 84942979072 memory_bandwidth: 3350000000000
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {
    major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES
  }
  driver_version: "13.0.0" runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" device_description_str: "H100"
"""
CASES = [
    ((8, 8192, 2560), jnp.float32, jnp.float32),
    ((8, 8192, 2560), jnp.float16, jnp.float32),
    ((1, 8192, 2560), jnp.bfloat16, jnp.bfloat16),
]
"""Dtypes of x and of decays: one pass, one channel a thread; two passes, two of them."""


def main() -> None:
    topology = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=H100, topology="1x1x1"
    )
    sharding = NamedSharding(
        Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec()
    )

    def like(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for shape, dtype, decay_dtype in CASES:
        x, a, h = like(shape, dtype), like(shape, decay_dtype), like(shape[::2])
        jax.jit(linear_scan.scan, static_argnums=3).lower(x, a, h, False).compile()
        jax.jit(linear_scan.gradients).lower(a, h, x, x, h).compile()
        positions, a_param = like(shape[:2], jnp.int32), like(shape[2:])
        inputs = Inputs(x, x, x, a_param, positions, h)
        jax.jit(rg_lru.recurrence).lower(inputs).compile()
        jax.jit(rg_lru.gradients).lower((inputs,), (x, None), (x, h)).compile()

    kernels: dict[str, dict[str, int]] = {}
    for file in DUMP.glob("*.ptx"):
        found = re.search(r"\.entry ((?:linear_scan|rg_lru)\w*)", file.read_text())
        if not found:
            continue
        said = subprocess.run(
            [CUDA / "bin" / "ptxas", "-v", "-arch=sm_90a", file, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        report = kernels.setdefault(found[1], {"registers": 0, "spill_bytes": 0})
        for key, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("spill_bytes", r"(\d+) bytes spill"),
        ):
            report[key] = max([report[key], *map(int, re.findall(pattern, said))])
    print(json.dumps(kernels))


if __name__ == "__main__":
    main()
