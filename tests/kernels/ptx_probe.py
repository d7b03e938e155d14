"""Compiles the GPU kernels for a card that is not there, and reports what they use.

Run as a program with a card of `CARDS` and a directory to dump to, because XLA reads its
flags once. Needs the CUDA plugin and ptxas from PyPI, neither a driver nor a GPU. Prints
one JSON object.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import nvidia.cuda_nvcc

CARD, DUMP = sys.argv[1], Path(sys.argv[2])
CUDA = Path(nvidia.cuda_nvcc.__path__[0])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_gpu_cuda_data_dir={CUDA}"
os.environ["MOSAIC_GPU_DUMP_TO"] = str(DUMP)
os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
os.environ["PATH"] += f":{CUDA / 'bin'}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recurrentgemma.kernels.linear_scan import mosaic_gpu
from recurrentgemma.kernels.linear_scan import pallas_gpu as linear_scan
from recurrentgemma.kernels.rg_lru import pallas_gpu as rg_lru
from recurrentgemma.kernels.rg_lru.gates import Inputs

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
CASES = [
    ((8, 8192, 2560), jnp.float32, jnp.float32),
    ((8, 8192, 2560), jnp.float16, jnp.float32),
    ((1, 8192, 2560), jnp.bfloat16, jnp.bfloat16),
]
"""Dtypes of x and of decays: one pass, one channel a thread; two passes, two of them."""


def target() -> str:
    """The description of the card that XLA reads."""
    card = dict(CARDS[CARD])
    major, minor = card.pop("capability")
    architecture = card.pop("architecture")
    accelerated = architecture.endswith("a")
    extension = "feature_extension: ACCELERATED_FEATURES" if accelerated else ""
    return DESCRIPTION.format(
        name=CARD, major=major, minor=minor, extension=extension, **card
    )


def waits(ptx: str) -> int:
    """How often the loop over groups of steps uses what it has itself loaded.

    Not at all if the loads of a group are under way while the one before is computed:
    then nothing names them but the moves at the loop's end.
    """
    parts = re.split(r"^(\$L__BB\w+):", ptx, flags=re.MULTILINE)[1:]
    cut = [
        re.split(rf"bra\S*\s+\{label};", block)
        for label, block in zip(parts[::2], parts[1::2], strict=True)
    ]
    loops = [pieces[0] for pieces in cut if len(pieces) > 1]
    loaded: set[str] = set()
    used = 0
    for statement in re.split(r"[;\n]", max(loops, key=lambda b: b.count("ld.global"))):
        name, _, operands = statement.strip().partition(" ")
        registers = re.findall(r"%[a-z]+\d+", operands.split("[")[0])
        if name.startswith("ld.global"):
            loaded |= set(registers)
        elif not name.startswith("mov."):
            used += bool(loaded & set(registers))
    return used


def assemble(file: Path) -> str:
    """What ptxas says of the code in a file; Mosaic has asked it itself."""
    said = file.with_suffix(".ptxas")
    if said.exists():
        return said.read_text()
    architecture = CARDS[CARD]["architecture"]
    return subprocess.run(
        [CUDA / "bin" / "ptxas", "-v", f"-arch={architecture}", file, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stderr


def main() -> None:
    topology = topologies.get_topology_desc(
        CARD, platform="cuda", target_config=target(), topology="1x1x1"
    )
    sharding = NamedSharding(
        Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec()
    )

    def like(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for shape, dtype, decay_dtype in CASES:
        x, a, h = like(shape, dtype), like(shape, decay_dtype), like(shape[::2])
        for module in (linear_scan, mosaic_gpu):
            if module is mosaic_gpu and CARD != "H100":
                continue
            scan = partial(module.scan, reverse=False)
            jax.jit(scan).lower(x, a, h).compile()
            jax.jit(module.gradients).lower(a, h, x, x, h).compile()
        positions, a_param = like(shape[:2], jnp.int32), like(shape[2:])
        inputs = Inputs(x, x, x, a_param, positions, h)
        jax.jit(rg_lru.recurrence).lower(inputs).compile()
        jax.jit(rg_lru.gradients).lower((inputs,), (x, None), (x, h)).compile()

    kernels: dict[str, dict[str, int]] = {}
    for file in DUMP.glob("*.ptx"):
        ptx = file.read_text()
        found = re.search(r"\.entry ((?:linear_scan|rg_lru)\w*)", ptx)
        if not found:
            continue
        said = assemble(file)
        report = kernels.setdefault(
            found[1], {"registers": 0, "spill_bytes": 0, "waits": 0}
        )
        report["waits"] = max(report["waits"], waits(ptx))
        for key, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("spill_bytes", r"(\d+) bytes spill"),
        ):
            report[key] = max([report[key], *map(int, re.findall(pattern, said))])
    print(json.dumps(kernels))


if __name__ == "__main__":
    main()
