"""XLA's flags in tests, which compile much and compute little."""

import importlib.util
import mmap
from pathlib import Path

COMMON = "--xla_backend_optimization_level=0"
"""For child processes, and for libtpu, which ends the process at a flag of CPU's."""
CPU = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def quick() -> str:
    """With these a compilation takes a quarter of the time; those that jaxlib knows."""
    spec = importlib.util.find_spec("jaxlib")
    folders = map(Path, (spec and spec.submodule_search_locations) or ())
    known = [COMMON]
    for library in (path for folder in folders for path in folder.glob("*jax_common*")):
        with library.open("rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            names = {
                flag: flag.split("=")[0].removeprefix("--") for flag in CPU.split()
            }
            known += [f for f, name in names.items() if text.find(name.encode()) >= 0]
    return " ".join(known)
