"""The real TPU compiler on a machine without a TPU (extra `tpu-plan`: libtpu).

It accepts or refuses a program for a named chip, and says what memory it takes. Its
static profile gives the cycles of every kernel: an estimate, with latencies and loops
but without contention, that ranks kernels and scales with size. It is no time.

The compiler reads its flags once a process, so the profile of a program is taken in a
process of its own.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
"""For the process that compiles, before jax is imported: no chip is looked for."""


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
    """Compiles a function for one chip.

    Args:
      generation: a name of `CHIPS`.
      function: takes arrays.
      *shapes: pytrees of anything with a shape and a dtype.

    Returns:
      What `jax.stages.Lowered.compile` returns.
    """
    sharding = NamedSharding(one_device(generation), PartitionSpec())
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
    )
    return jax.jit(function).lower(*placed).compile()


class Profile(NamedTuple):
    """Of a program, by the name of its kernels.

    Attributes:
      cycles: estimated, the whole grid.
      spills: registers stored to memory and loaded again, instructions of its code.
      output: what the code printed.
    """

    cycles: dict[str, int]
    spills: dict[str, int]
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
    with tempfile.TemporaryDirectory() as directory:
        flags = (
            f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=hlo-static-per-bundle-utilization"
        )
        if cycles:
            flags += f" --xla_jf_dump_static_llo_profile_to={directory}/cycles"
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "LIBTPU_INIT_ARGS": flags,
            "PYTHONPATH": os.pathsep.join(path),
        }
        Path(directory, "cycles").mkdir()
        result = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(result.stderr[-2000:])
        return Profile(
            _cycles(Path(directory, "cycles")),
            _spills(Path(directory)),
            result.stdout,
        )


def _cycles(directory: Path) -> dict[str, int]:
    found = {}
    for file in directory.glob("*_static_llo_profile.textproto"):
        match = re.search(r"estimated_cycles: (\d+)", file.read_text())
        if match:
            found[file.name.split("_TPU")[0]] = int(match[1])
    return found


def _spills(directory: Path) -> dict[str, int]:
    found = {}
    for file in directory.glob("*pre-delay_hlo-static-per-bundle-utilization.txt"):
        name = re.sub(r"^\d+-|-\d+-pre-delay.*$", "", file.name)
        columns: list[str] = []
        total = 0
        for line in file.read_text().splitlines():
            if "MATMUL" in line:
                columns = [column.strip() for column in line.split(",")]
            elif columns and re.fullmatch(r"\d+( \d+)+ *", line):
                counts = zip(columns, line.split(), strict=False)
                total += sum(int(n) for column, n in counts if "SPILL" in column)
        found[name] = total
    return found
