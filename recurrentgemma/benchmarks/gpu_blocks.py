"""Block choices of the recurrence's kernels for the GPU that is here, as data.

For each kernel and width of elements, one number of the present choice is varied at a
time, and what is fastest stays: steps of a group, programs that fill the chip, channels
of a program, steps of the shortest chunk. A candidate counts by its times over all
workloads, relative to the choice that it starts from. One whose results differ, that
does not compile or does not fit says so in its row, and the rest goes on.

Writes every sample, and gpu_blocks.json: the table of the package with the rows of this
device's compute capability. It takes the place of kernels/linear_scan/gpu_blocks.json.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from recurrentgemma._atomic import replace_file
from recurrentgemma.benchmarks import device
from recurrentgemma.benchmarks.report import Column, Report, Row, note
from recurrentgemma.benchmarks.scan_programs import check_workloads
from recurrentgemma.kernels import gpu
from recurrentgemma.kernels.linear_scan import gpu_blocks
from recurrentgemma.kernels.linear_scan.gpu_blocks import GpuBlocks
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS, Workload

USUAL = ("train_2b", "prefill_2b", "prefill_67m_long")
DTYPES = {4: "float32", 2: "bfloat16"}
"""By the bytes of an element."""
FIELDS: dict[str, dict[int, tuple[Any, ...]]] = {
    "unroll": dict.fromkeys(DTYPES, (4, 8, 12, 16, 24, 32)),
    "programs": dict.fromkeys(DTYPES, (256, 512, 1024, 2048)),
    "channels": {4: ((32,), (64, 32)), 2: ((64, 32), (32,), (128, 64, 32))},
    "shortest_chunk": dict.fromkeys(DTYPES, (64, 128, 256)),
}
"""What a field of the blocks may be, by the bytes of an element."""
TOLERANCES = {4: 1e-4, 2: 2e-2}
"""Largest difference between two choices, as a part of the largest value: chunks are
rounded apart, and a state of 16 bits in each of its steps."""
INTERPRETED = (0, 0)
"""Compute capability of the rows of a CPU, which no GPU has."""
KEY = ("kernel", "dtype", "workload", "blocks")
COLUMNS = (
    Column("kernel", "kernel", 20),
    Column("dtype", "dtype", 8),
    Column("workload", "workload", 16),
    Column("blocks", "blocks", 44),
    Column("measured ms", "measured_ms", 11),
)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    what = f"names of shapes: {', '.join(WORKLOADS)}"
    flags.DEFINE_list("workloads", list(USUAL), what, flag_values=values)
    what = f"kernels: {', '.join(gpu_blocks.KERNELS)}"
    flags.DEFINE_list("kernels", list(gpu_blocks.KERNELS), what, flag_values=values)
    what = "seconds after which no other candidate is timed"
    flags.DEFINE_float("seconds", 900.0, what, flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """Sweeps the kernels and writes the table."""
    workloads = check_workloads(values["workloads"])
    unknown = set(values["kernels"]) - set(gpu_blocks.KERNELS)
    if unknown:
        expected = ", ".join(gpu_blocks.KERNELS)
        raise ValueError(f"--kernels: expected some of {expected}, got {unknown}")
    end = time.perf_counter() + values["seconds"]
    capability = gpu.capability() or INTERPRETED
    report = Report(folder / "gpu_blocks_samples.json", COLUMNS, key=KEY)
    found = {}
    for kernel in values["kernels"]:
        for itemsize in DTYPES:
            sweep = Sweep(kernel, itemsize, workloads, report, end)
            found[kernel, capability, itemsize] = sweep.best()
    path = folder / "gpu_blocks.json"
    with replace_file(path) as partial:
        partial.write_text(gpu_blocks.to_text(found), encoding="utf-8")
    note(f"Written to {path}")


class Sweep:
    """The choice of the blocks of one kernel for elements of one width."""

    def __init__(
        self,
        kernel: str,
        itemsize: int,
        workloads: Sequence[str],
        report: Report,
        end: float,
    ):
        self._kernel, self._itemsize, self._end = kernel, itemsize, end
        self._workloads, self._report = workloads, report
        self._seconds: dict[GpuBlocks, float] = {}

    def best(self) -> GpuBlocks:
        """The fastest blocks that were found, or the present ones."""
        like = jax.ShapeDtypeStruct((1, 1, 1), DTYPES[self._itemsize])
        present = best = gpu_blocks.find(self._kernel, [like], False)
        if not math.isfinite(self._mean(present, present)):
            return present
        for field, choices in FIELDS.items():
            candidates = [
                best._replace(**{field: choice}) for choice in choices[self._itemsize]
            ]
            best = min([best, *candidates], key=lambda b: self._mean(b, present))
        return best

    def _mean(self, blocks: GpuBlocks, present: GpuBlocks) -> float:
        """The geometric mean of its seconds; infinite if it does not run everywhere."""
        if blocks not in self._seconds:
            rows = [self._row(blocks, present, name) for name in self._workloads]
            times = [row.get("measured_ms", math.inf) for row in rows]
            self._seconds[blocks] = math.exp(statistics.fmean(map(math.log, times)))
        return self._seconds[blocks]

    def _row(self, blocks: GpuBlocks, present: GpuBlocks, workload: str) -> Row:
        dtype = DTYPES[self._itemsize]
        named = ", ".join(f"{name} {value}" for name, value in blocks._asdict().items())
        key = dict(zip(KEY, (self._kernel, dtype, workload, named), strict=True))
        row: Row = {"remark": "left out: the seconds are over"}
        if time.perf_counter() < self._end:
            row = measure(self._kernel, WORKLOADS[workload], dtype, blocks, present)
        self._report.add(key | row)
        return row


def measure(
    kernel: str, workload: Workload, dtype: str, blocks: GpuBlocks, present: GpuBlocks
) -> Row:
    """Times blocks whose results are those of the present ones."""
    try:
        function, arguments = program(kernel, workload, dtype)
        compiled = _compiled(function, arguments, blocks)
        if blocks != present:
            right = _compiled(function, arguments, present)(*arguments)
            for error in differences(compiled(*arguments), right):
                if (
                    not error <= TOLERANCES[jnp.dtype(dtype).itemsize]
                ):  # true of NaN too
                    return {"remark": f"WRONG by {error:.2g}, not timed"}
        samples = device.seconds_per_call(compiled, *arguments)
    except Exception as error:  # noqa: BLE001 - whatever a device comes up with
        reason = str(error).strip().split("\n")[0][:200]
        return {"remark": f"{type(error).__name__}: {reason}"}
    return {
        "measured_ms": 1e3 * statistics.median(samples),
        "samples_ms": [1e3 * sample for sample in samples],
    }


def _compiled(function, arguments, blocks):
    interpret = jax.default_backend() == "cpu"
    run = functools.partial(function, blocks=blocks, interpret=interpret)
    return jax.jit(run).lower(*arguments).compile()


def differences(found: Any, expected: Any) -> Iterator[float]:
    """The largest difference of each result, as a part of its largest value."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for array, right in pairs:
        array, right = array.astype(jnp.float32), right.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(right)), jnp.finfo(jnp.float32).tiny)
        yield float(jnp.max(jnp.abs(array - right)) / scale)


def program(
    kernel: str, workload: Workload, dtype: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A kernel's function, which takes `blocks` and `interpret`, and random arguments."""
    from recurrentgemma.kernels.linear_scan import pallas_gpu as scans
    from recurrentgemma.kernels.rg_lru import pallas_gpu as units
    from recurrentgemma.kernels.rg_lru.gates import Inputs

    keys = iter(jax.random.split(jax.random.key(0), 8))

    def random(*shape, dtype=dtype):
        return jax.random.normal(next(keys), shape, dtype)

    batch, length, width = workload
    x, y_gradient = random(*workload), random(*workload)
    h0, last_gradient = (random(batch, width, dtype=jnp.float32) for _ in range(2))
    if kernel.startswith("linear_scan"):
        a = jax.random.uniform(next(keys), workload, minval=0.5).astype(dtype)
        if kernel == "linear_scan":
            return functools.partial(scans.scan, reverse=False), (x, a, h0)
        return scans.gradients, (a, h0, x, y_gradient, last_gradient)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    gates, a_param = (random(*workload), random(*workload)), jnp.ones(width)
    inputs = Inputs(x, *gates, a_param, positions, h0)
    if kernel == "rg_lru":
        return units.recurrence, (inputs,)
    return units.gradients, ((inputs,), (x, None), (y_gradient, last_gradient))
