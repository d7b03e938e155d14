"""The real TPU compiler on a machine without a TPU (extra `tpu-plan`: libtpu).

It accepts or refuses a program for a named chip, and says what memory it takes. Its
static profile gives the cycles of every kernel: an estimate, with latencies and loops
but without contention, that ranks kernels and scales with size. It is no time.

The compiler reads its flags once a process, so the profile of a program is taken in a
process of its own.
"""

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recurrentgemma.benchmarks import bundles
from recurrentgemma.benchmarks.report import package_version

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
"""For the process that compiles, before jax is imported: no chip is looked for."""
PROFILER_REFUSES = "Static LLO profiling of"
"""In the error of a process that died of it: on copies with three strides."""
ROOT = str(Path(__file__).resolve().parents[2])
"""What this package is imported from."""
PACKAGES = ("jax", "jaxlib", "libtpu")
"""Packages whose versions decide what a program is compiled to."""


class Chip(NamedTuple):
    """A TPU generation, as one device of jax sees it.

    Attributes:
      topology: the smallest that the compiler knows by name.
      clock_hz: from the published peak of its matrix units.
      bytes_per_s: published memory bandwidth.
    """

    topology: str
    clock_hz: float
    bytes_per_s: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 819e9),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2765e9),
    "v6e": Chip("v6e:2x2", 1.75e9, 1640e9),
}


@functools.cache
def one_device(generation: str) -> Mesh:
    """A mesh of one device of a generation of `CHIPS`."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[generation].topology
    )
    return Mesh(np.array(topology.devices[:1]), ("device",))


def compile_for(generation: str, function: Callable[..., Any], *shapes: Any) -> Any:
    """A function compiled for one chip.

    Args:
      generation: A name of `CHIPS`.
      function: Takes arrays; jitted already or not.
      *shapes: Pytrees of anything with a shape and a dtype.

    Returns:
      A `jax.stages.Compiled`.
    """
    sharding = NamedSharding(one_device(generation), PartitionSpec())
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
    )
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    return jitted.lower(*placed).compile()


def fingerprint(text: str) -> str:
    """Of a program and of what compiles it: equal ones have equal estimates."""
    versions = ",".join(f"{name} {package_version(name)}" for name in PACKAGES)
    return hashlib.sha256(f"{versions}\n{text}".encode()).hexdigest()[:16]


class Profile(NamedTuple):
    """Of a program.

    Attributes:
      cycles: estimated, of the whole grid, by kernel.
      spills: registers stored to memory and loaded again, instructions of its code, by
        kernel.
      issued: bundles and slot use of its largest kernel; see `bundles.issued`.
      output: what the code printed.
    """

    cycles: dict[str, int]
    spills: dict[str, int]
    issued: dict[str, Any] | None
    output: str


def profile(code: str, *, path: Sequence[str] = (), cycles: bool = True) -> Profile:
    """Runs Python code that compiles one program, and reads the compiler's profile.

    Args:
      code: compiles a program for a TPU.
      path: directories put before its import path.
      cycles: whether to estimate them, which takes a while.

    Raises:
      RuntimeError: the code failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        flags = (
            f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
            f"--xla_jf_dump_llo_pass_label_regex={bundles.PASSES}"
        )
        if cycles:
            flags += f" --xla_jf_dump_static_llo_profile_to={directory}/cycles"
        Path(directory, "cycles").mkdir()
        output = run(code, path=path, environment={"LIBTPU_INIT_ARGS": flags})
        return Profile(
            bundles.cycles(directory / "cycles"),
            bundles.spills(directory),
            bundles.issued(directory),
            output,
        )


def run(
    code: str,
    *,
    path: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """What Python code prints in a process that can compile for TPU.

    Args:
      code: the program.
      path: directories put before its import path.
      environment: variables set for it, such as the compiler's flags.

    Raises:
      RuntimeError: the code failed; with the end of what it printed.
    """
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join([*path, ROOT]),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return result.stdout
