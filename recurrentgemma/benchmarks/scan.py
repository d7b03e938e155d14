"""The recurrence on TPU: what the kernels must move, what the compiler expects of them.

    python -m recurrentgemma.benchmarks.scan [--official DIRECTORY]

For each program, workload and TPU generation: the least bytes (every argument read once,
every result written once), the time these take at the published bandwidth (roofline),
the bytes that the compiled program moves (of a kernel, its blocks), the compiler's estimate of its cycles, and the
estimated time, the longer one of cycles / clock and bytes / bandwidth. These are
estimates of the real TPU compiler (extra `tpu-plan`), made without a TPU: they rank
programs and scale with size. Where the device is a TPU, measured times stand beside
them. DIRECTORY holds the official package `recurrentgemma`; its scan is compiled the
same way in a process of its own. The JSON document is written last.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recurrentgemma.benchmarks import ahead_of_time
from recurrentgemma.benchmarks.provenance import provenance
from recurrentgemma.config import PRESETS, Runtime
from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels.linear_scan import linear_scan, linear_scan_gradients
from recurrentgemma.kernels.linear_scan.block_sizes import (
    LANES,
    MAX_STEPS,
    block_sizes,
)
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS, Workload
from recurrentgemma.kernels.rg_lru import rg_lru, rg_lru_gradients

RESULTS = Path(__file__).parent / "results" / "scan.json"
OFFICIAL = Path(__file__).parent / "opponents" / "official_scan.py"
PROFILED = ("prefill_2b", "train_2b")
"""Workloads whose cycles are taken: the profiler needs half a minute for a program."""
WITHOUT_CYCLES = ("associative", "composed")
"""Implementations of hundreds of small kernels, which the profiler takes minutes for."""
DTYPES = ("float32", "bfloat16")
REPETITIONS = 20

Program = tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]


def _program(
    workload: Workload, dtype: str, *, op: str, gradient: bool, implementation: str
) -> Program:
    """A function and the shapes of its arguments."""
    batch, length, width = workload
    shape = jax.ShapeDtypeStruct
    sequence, state = shape(workload, dtype), shape((batch, width), "float32")
    if op == "linear_scan":
        function = linear_scan_gradients if gradient else linear_scan
        arguments = (sequence, sequence, state)
        if gradient:
            arguments = (sequence, state, sequence, sequence, state)
    else:
        function = rg_lru_gradients if gradient else rg_lru
        a_param = state if gradient else shape((width,), "float32")
        positions = shape((batch, length), "int32")
        arguments = (*[sequence] * 3, a_param, positions, state)
        if gradient:
            arguments += (sequence, sequence, state)
    return partial(function, implementation=implementation), arguments


PROGRAMS: dict[str, Callable[[Workload, str], Program]] = {
    f"{op}{' gradient' if gradient else ''}: {implementation}": partial(
        _program, op=op, gradient=gradient, implementation=implementation
    )
    for op, implementations in {
        "linear_scan": ("pallas_tpu", "associative"),
        "rg_lru": ("pallas_tpu", "composed"),
    }.items()
    for gradient in (False, True)
    for implementation in implementations
}
OFFICIAL_PROGRAMS = {
    "linear_scan: official": "scan",
    "linear_scan and gradient: official": "scan_and_gradient",
    "rg_lru: official": "gates_and_scan",
    "rg_lru and gradient: official": "gates_and_scan_and_gradient",
}

PRINT_BYTES = "print(compiled.cost_analysis().get('bytes accessed', 0))\n"


def program_code(generation: str, program: str, workload: str, dtype: str) -> str:
    """Python that compiles one of our programs and prints the bytes that it moves."""
    return (
        "from recurrentgemma.benchmarks import ahead_of_time, scan\n"
        f"workload = scan.WORKLOADS[{workload!r}]\n"
        f"function, shapes = scan.PROGRAMS[{program!r}](workload, {dtype!r})\n"
        "compiled = ahead_of_time.compile_for("
        f"{generation!r}, function, *shapes)\n"
        f"{PRINT_BYTES}"
    )


def official_code(generation: str, program: str, workload: str, dtype: str) -> str:
    """The same of a program around the official scan."""
    topology = ahead_of_time.CHIPS[generation].topology
    arguments = (topology, OFFICIAL_PROGRAMS[program], *WORKLOADS[workload], dtype)
    return f"{OFFICIAL.read_text()}\ncompiled = compile_for{arguments!r}\n{PRINT_BYTES}"


def least_bytes(program: Program) -> int:
    """Of every argument and every result, once."""
    function, shapes = program
    leaves = jax.tree.leaves((shapes, jax.eval_shape(function, *shapes)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def block_bytes(name: str, workload: Workload, dtype: str) -> int:
    """What the blocks of a kernel of ours transfer.

    That is every array once, and in a gradient also, for each block of time, the group
    of results before it.
    """
    least = least_bytes(PROGRAMS[name](workload, dtype))
    itemsize = jnp.dtype(dtype).itemsize
    if "gradient" not in name:
        return least
    arrays, longest = (5, MAX_STEPS) if name.startswith("linear_scan") else (8, LANES)
    sizes = block_sizes(workload, (itemsize,) * arrays)
    blocks = math.ceil(workload.length / min(sizes.steps, longest))
    return least + (workload.batch * blocks * sizes.group * workload.width * itemsize)


def estimate(
    generation: str, program: str, workload: str, dtype: str, official: Path | None
) -> dict[str, Any]:
    """What the compiler says of one program for one chip.

    Args:
      generation: a name of `ahead_of_time.CHIPS`.
      program: a name of `PROGRAMS` or of `OFFICIAL_PROGRAMS`.
      workload: a name of `WORKLOADS`.
      dtype: of the sequences.
      official: directory of the official package, for its programs.
    """
    if official is None:
        code, path = program_code(generation, program, workload, dtype), []
    else:
        code, path = official_code(generation, program, workload, dtype), [official]
    run = partial(ahead_of_time.profile, code, path=list(map(str, path)))
    with_cycles = not program.endswith(WITHOUT_CYCLES)
    if program in PROGRAMS and with_cycles:
        # The compiler counts an array twice of which a kernel has two views.
        moved = block_bytes(program, WORKLOADS[workload], dtype)
    else:  # in a process of its own: under the profiler it does not say
        moved = float(run(cycles=False).output)
    found: dict[str, Any] = {"moved_bytes": moved}
    if with_cycles:
        chip = ahead_of_time.CHIPS[generation]
        try:
            profile = run()
        except RuntimeError as error:  # it aborts on copies with three strides
            reason = re.search(r"Static LLO profiling of .*", str(error))
            return found | {"cycles_refused": reason[0] if reason else str(error)}
        cycles = sum(profile.cycles.values())
        found["cycles"] = cycles
        found["cycles_by_kernel"] = profile.cycles
        found["spills"] = sum(profile.spills.values())
        found["estimated_ms"] = 1e3 * max(
            cycles / chip.clock_hz, moved / chip.bytes_per_s
        )
    return found


def measure(program: Program) -> dict[str, Any]:
    """Times a program on this machine's device, with random inputs."""
    function, shapes = program
    rng = np.random.default_rng(0)

    def random(shape):
        values = rng.uniform(0.1, 0.9, shape.shape)
        return jax.device_put(jnp.asarray(values).astype(shape.dtype))

    arguments = [random(shape) for shape in shapes]
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments))
    samples_ms = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        samples_ms.append(1e3 * (time.perf_counter() - start))
    return {
        "measured_ms": statistics.median(samples_ms),
        "samples_ms": samples_ms,
        "device": jax.devices()[0].device_kind,
    }


def rows(
    generations: Sequence[str],
    workloads: Sequence[str],
    profiled: Sequence[str],
    official: Path | None,
    left_out: tuple[str, ...],
) -> list[dict[str, Any]]:
    """One for each program, workload, dtype and generation."""
    found = []
    names = [*PROGRAMS, *(OFFICIAL_PROGRAMS if official else ())]
    names = [name for name in names if not name.endswith(left_out)]
    on_tpu = jax.default_backend() == "tpu"
    for workload in workloads:
        for dtype in DTYPES:
            for name in names:
                program = None
                if name in PROGRAMS:
                    program = PROGRAMS[name](WORKLOADS[workload], dtype)
                for generation in generations:
                    chip = ahead_of_time.CHIPS[generation]
                    row: dict[str, Any] = {
                        "program": name,
                        "workload": workload,
                        "dtype": dtype,
                        "generation": generation,
                    }
                    if program:
                        least = least_bytes(program)
                        row["least_bytes"] = least
                        row["roofline_ms"] = 1e3 * least / chip.bytes_per_s
                    if workload in profiled:
                        where = None if program else official
                        row |= estimate(generation, name, workload, dtype, where)
                    if on_tpu and program:
                        row |= measure(program)
                    print(line(row), flush=True)
                    found.append(row)
    return found


def in_model(generation: str, length: int) -> list[dict[str, Any]]:
    """Three layers (R R A) of the 2B model, with the kernels and with plain code.

    Bytes and temporary memory of the compiled forward pass, and of forward and backward,
    at batch 1, bfloat16, without the logits: what the kernels save where they are used.
    """
    config = dataclasses.replace(PRESETS["recurrentgemma-2b"], num_layers=3)
    runtime = Runtime(compute_dtype="bfloat16")
    model = nnx.eval_shape(lambda: Griffin(config, rngs=nnx.Rngs(0), runtime=runtime))
    tokens = jax.ShapeDtypeStruct((1, length), "int32")

    def forward(model, tokens):
        return model(tokens)

    def train(model, tokens):
        return jax.grad(lambda model: jnp.sum(model(tokens)[0], dtype="float32"))(model)

    found = []
    plain = {"linear_scan": ("associative",), "rg_lru": ("composed",)}
    for kernels in (True, False):
        with contextlib.ExitStack() as stack:
            for name, names in plain.items() if not kernels else ():
                op = importlib.import_module(f"recurrentgemma.kernels.{name}")
                stack.enter_context(
                    mock.patch.dict(op.PLATFORM_DEFAULTS, {"tpu": names})
                )
            for function in (forward, train):
                jax.clear_caches()
                compiled = ahead_of_time.compile_for(
                    generation, function, model, tokens
                )
                memory = compiled.memory_analysis()
                row = {
                    "program": f"3 layers of 2B, {function.__name__}: "
                    + ("kernels" if kernels else "plain"),
                    "workload": f"(1, {length})",
                    "dtype": "bfloat16",
                    "generation": generation,
                    "moved_bytes": compiled.cost_analysis()["bytes accessed"],
                    "temporary_bytes": memory.temp_size_in_bytes,
                }
                print(line(row), flush=True)
                found.append(row)
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [
        f"{row['program']:<36}{row['workload']:<18}{row['dtype']:<10}",
        f"{row['generation']:<5}",
    ]
    for key, width, scale in [
        ("least_bytes", 10, 1e-6),
        ("moved_bytes", 10, 1e-6),
        ("roofline_ms", 9, 1),
        ("cycles", 10, 1e-3),
        ("spills", 7, 1),
        ("estimated_ms", 9, 1),
        ("measured_ms", 9, 1),
    ]:
        text = f"{row[key] * scale:.4g}" if key in row else "-"
        cells.append(text.rjust(width))
    return "".join(cells)


HEADER = (
    f"{'program':<36}{'workload':<18}{'dtype':<10}{'chip':<5}{'least MB':>10}"
    f"{'moved MB':>10}{'floor ms':>9}{'kcycles':>10}{'spills':>7}{'est. ms':>9}"
    f"{'meas. ms':>9}"
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--official", type=Path, metavar="DIRECTORY")
    parser.add_argument("--generations", nargs="+", default=["v5e"])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--profiled", nargs="*", default=list(PROFILED))
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="IMPLEMENTATION")
    parser.add_argument(
        "--model", type=int, metavar="T", help="also three layers of 2B at this length"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    document = provenance()
    with tempfile.TemporaryDirectory() as directory:
        official = None
        if options.official:  # alone: what else lies beside it must not be imported
            official = Path(directory)
            package = options.official.absolute() / "recurrentgemma"
            os.symlink(package, official / "recurrentgemma")
        print(HEADER)
        found = rows(
            options.generations,
            options.workloads,
            options.profiled,
            official,
            tuple(options.leave_out),
        )
    if options.model:
        os.environ |= ahead_of_time.ENVIRONMENT
        found += in_model(options.generations[0], options.model)
    packages = ("jax", "jaxlib", "libtpu")
    versions = {name: _version(name) for name in packages} | {"python": sys.version}
    document |= {"versions": versions, "rows": found}
    options.output.parent.mkdir(exist_ok=True, parents=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
