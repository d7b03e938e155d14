"""The real TPU compiler on a machine without a TPU (extra `tpu-plan`: libtpu).

It accepts or refuses a program for a named chip, and says what memory it takes. Its
dumps show the machine code of every kernel: a list of bundles, one issued a cycle. The
number of issued bundles is an estimate of the cycles, without what a real machine waits
for; it ranks kernels and scales with size. It is no time.

The compiler reads its flags once a process, so each profile is taken in a new process.
"""

import functools
import os
import re
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

from recurrentgemma._tpu_search import COMPILER_ONLY, NO_CHIP
from recurrentgemma.planning.topologies import CHIPS as PUBLISHED

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", **NO_CHIP, **COMPILER_ONLY}
"""Variables of a process that compiles, set before it imports jax: without them the
compiler looks for a chip."""
BUNDLES = "packed-bundles-post-ra"
SLOTS = "pre-delay_hlo-static-per-bundle-utilization"
"""Passes of the compiler after which its dumps hold the bundles, where a wait is an empty
bundle, and the slots that each bundle fills."""
DELAY_SLOTS = 4
"""Bundles after a jump that are issued before it is taken."""
ROOT = str(Path(__file__).resolve().parents[2])
"""Directory that this package is imported from."""

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)?:[\s>]*\{")
_JUMP = re.compile(r"sbr\.rel.*?target bundleno = (\d+)")
_EXIT_TEST = re.compile(
    r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/"
)


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
    generation: Chip(topology, clock_hz, PUBLISHED[generation].memory_bytes_per_s)
    for generation, topology, clock_hz in (
        ("v5e", "v5e:2x2", 1.5e9),
        ("v5p", "v5p:2x2x1", 1.75e9),
        ("v6e", "v6e:2x2", 1.75e9),
    )
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


class Profile(NamedTuple):
    """What the compiler's dumps say of the kernels of a program.

    Attributes:
      cycles: Number of bundles of instructions that a kernel issues, one a cycle if
        nothing waits, by kernel.
      spills: Number of instructions that store registers to memory, by kernel.
    """

    cycles: dict[str, int]
    spills: dict[str, int]


def profile(code: str, *, path: Sequence[str] = ()) -> Profile:
    """Runs Python code that compiles programs, and reads what the compiler dumps.

    Args:
      code: Python that compiles for a TPU.
      path: Directories put before its import path.

    Raises:
      RuntimeError: the code failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as name:
        flags = (
            f"--xla_jf_dump_to={name} --xla_jf_dump_llo_text=true "
            f"--xla_jf_dump_llo_pass_label_regex=({BUNDLES}|{SLOTS})"
        )
        run(code, path=path, environment={"LIBTPU_INIT_ARGS": flags})
        return read_profile(Path(name))


def read_profile(directory: Path) -> Profile:
    """The profile of the kernels whose dumps lie in a directory."""
    cycles, spills = {}, {}
    for file in directory.glob(f"*-{BUNDLES}.txt"):
        cycles[_kernel(file)] = sum(turns_of_bundles(file.read_text()))
    for file in directory.glob(f"*{SLOTS}.txt"):
        spills[_kernel(file)] = _spills(file.read_text())
    return Profile(cycles, spills)


def turns_of_bundles(text: str) -> list[int]:
    """How often each bundle is issued.

    As often as the constant turns of the loops around it say, the grid among them; what
    is conditional counts as executed, a loop of unknown length once.
    """
    bundles: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    loops = [
        range(target, index + 1)
        for index, bundle in enumerate(bundles)
        for target in map(int, _JUMP.findall(bundle))
        if target <= index
    ]
    times = [1] * len(bundles)
    for loop in loops:
        inside = {i for other in loops if len(other) < len(loop) for i in other}
        outside = "".join(bundles[i] for i in loop if i not in inside)
        tests = _EXIT_TEST.findall(outside)
        if tests:
            for i in range(loop.start, min(loop.stop + DELAY_SLOTS, len(bundles))):
                times[i] *= int(tests[-1])
    return times


def _spills(text: str) -> int:
    """Sum of the column of spills, below the row of capacities."""
    columns: list[str] = []
    rows = []
    for line in text.splitlines():
        if "MATMUL" in line:
            columns = [column.strip() for column in line.split(",")]
        elif columns and re.fullmatch(r"\s*\d+(\s+\d+)+\s*", line):
            rows.append(int(line.split()[columns.index("VSTORE:SPILL")]))
    return sum(rows[1:])


def _kernel(file: Path) -> str:
    """The name of a kernel with its time stamp: two kernels may have one name."""
    return re.sub(r"-\d+-(packed|pre-delay).*$", "", file.name)


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
