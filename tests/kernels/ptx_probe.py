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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recurrentgemma.benchmarks.gpu_programs import CARDS, device_of
from recurrentgemma.kernels.linear_scan import mosaic_gpu
from recurrentgemma.kernels.linear_scan import pallas_gpu as linear_scan
from recurrentgemma.kernels.rg_lru import pallas_gpu as rg_lru
from recurrentgemma.kernels.rg_lru.gates import Inputs

CASES = [
    ((8, 8192, 2560), jnp.float32, jnp.float32),
    ((8, 8192, 2560), jnp.float16, jnp.float32),
    ((1, 8192, 2560), jnp.bfloat16, jnp.bfloat16),
]
"""Dtypes of x and of decays: one pass, one channel a thread; two passes, two of them."""


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
    mesh = Mesh(np.array([device_of(CARD)]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

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
