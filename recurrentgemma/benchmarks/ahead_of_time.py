"""The real TPU compiler on a machine without a TPU (extra `tpu-plan`: libtpu).

It accepts or refuses a program for a named chip, and says what memory it takes. Its
static profile gives the cycles of every kernel: an estimate, with latencies and loops
but without contention, that ranks kernels and scales with size. It is no time.

The compiler reads its flags once a process, so each profile is taken in a new process.
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
"""Variables of a process that compiles, set before it imports jax: without them the
compiler looks for a chip."""
ROOT = str(Path(__file__).resolve().parents[2])
"""Directory that this package is imported from."""
PACKAGES = ("jax", "jaxlib", "libtpu")
"""Packages whose versions decide what a program is compiled to."""


class Chip(NamedTuple):
    """A TPU generation, as one device of jax sees it.

    Attributes:
      topology: Name of the smallest topology that the compiler knows.
      clock_hz: Clock rate, from the published peak of the matrix units.
      bytes_per_s: Published memory bandwidth.
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
    """A hash of a program and of the compiler: equal ones have equal estimates."""
    versions = ",".join(f"{name} {package_version(name)}" for name in PACKAGES)
    return hashlib.sha256(f"{versions}\n{text}".encode()).hexdigest()[:16]


class Profile(NamedTuple):
    """What the compiler estimates of a program.

    Attributes:
      cycles: Estimated cycles of the whole grid, by kernel.
      spills: Number of instructions that store registers to memory, by kernel.
      issued: Bundles and slot use of the largest kernel; see `bundles.issued`.
      output: What the code printed.
    """

    cycles: dict[str, int]
    spills: dict[str, int]
    issued: dict[str, Any] | None
    output: str


def profile(code: str, *, path: Sequence[str] = (), cycles: bool = True) -> Profile:
    """Runs Python code that compiles one program, and reads the compiler's profile.

    Args:
      code: Python that compiles one program for a TPU.
      path: Directories put before its import path.
      cycles: Whether to estimate them, which takes a while; the compiler dies of blocks
        that are copied with three strides.

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
      code: The program.
      path: Directories put before its import path.
      environment: Variables set for it, such as the compiler's flags.

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
