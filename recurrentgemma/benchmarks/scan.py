"""The recurrence's programs on the device that is here: are they right, how fast are they.

The device's copy bandwidth comes first: x + 1 over large arrays, read and written once.
Then each program of the platform, dtype and workload: it is compared with the op's
`reference` in float32 on a small shape; if it agrees, it is timed. Calls are dispatched
back to back between two waits, so that the host's part is hidden where a call takes
longer than its dispatch, whose time (of a program that does nothing) stands in the
document. The bandwidth of a row is that of its least bytes: every argument read once and
every result written once; what fits a cache may be faster than copies. Estimates that
were made for this TPU stand beside.

What does not fit the memory, cannot run here or is wrong says so in its row. The file
of a TPU or a GPU is meant to be sent in.
"""

import argparse
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma.benchmarks.report import RESULTS, Column, Report, Row, note
from recurrentgemma.benchmarks.scan_programs import (
    KEY,
    KEY_COLUMNS,
    OPS,
    PROGRAMS,
    least_bytes,
    programs,
    random_arguments,
    split_name,
)
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS, Workload

MEASURED = ("train_2b", "train_2b_long", "prefill_2b", "decode_2b")
"""Workloads of an accelerator."""
MEASURED_ON_CPU = ("train_small", "prefill_67m")
CHECKED = (Workload(2, 300, 512), Workload(8, 1, 512))
"""Small shapes; an op is checked at the first that is one for it."""
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
"""Relative RMS error: of sums of some hundred float32 products; of results, and of the
states inside a gradient, that are rounded to 8 and to 11 bits."""
TINY = 1e-30
"""Scale of errors where all expected values are zero."""
BUDGET_S = 240.0
"""Seconds after which nothing more is measured."""
SAMPLES = 7
SAMPLE_S = 0.1
MOST_CALLS = 100
"""Largest number of calls in a sample."""
USABLE_MEMORY = 0.9
COPY_BYTES = {"cpu": (2**24,)}
ACCELERATOR_COPY_BYTES = (2**26, 2**28, 2**30)
GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""Names of `ahead_of_time.CHIPS`, by what jax calls a device."""
COLUMNS = (
    *KEY_COLUMNS,
    Column("least MB", "least_bytes", 8, 1e-6),
    Column("rms error", "rms_error", 9),
    Column("measured ms", "measured_ms", 11),
    Column("GB/s", "bytes_per_s", 8, 1e-9),
    Column("of copy %", "bandwidth_share", 9, 100),
    Column("estimate ms", "estimated_ms", 11),
)
ESTIMATES = RESULTS / "scan_estimates.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS))
    parser.add_argument(
        "--seconds",
        type=float,
        default=BUDGET_S,
        help="after which no other program is measured",
    )


def run(options: argparse.Namespace) -> None:
    """Measures the programs of the device that is here."""
    start = time.perf_counter()
    device, platform = jax.devices()[0], jax.default_backend()
    kind = device.device_kind
    workloads = options.workloads
    if workloads is None:
        workloads = MEASURED_ON_CPU if platform == "cpu" else MEASURED
    memory = _memory_bytes(device)
    copies = copy_bandwidths(platform, memory)
    bandwidth = max(copies.values())
    dispatch_s = min(_samples_s(jax.jit(lambda x: x + 1), [jnp.ones((8, 128))], 100))
    note(f"{kind}: copies {bandwidth / 1e9:.4g} GB/s, a call {1e6 * dispatch_s:.3g} us")
    report = Report(
        options.output,
        COLUMNS,
        key=KEY,
        accelerator=kind,
        memory_bytes=memory,
        copy_bytes_per_s=copies,
        dispatch_ms=1e3 * dispatch_s,
    )
    generation = str(GENERATIONS.get(kind, kind))
    expected = _expected(ESTIMATES)
    for workload in workloads:
        for dtype in _dtypes(device):
            for name in programs(platform, WORKLOADS[workload]):
                key = dict(zip(KEY, (name, workload, dtype, generation), strict=True))
                row: Row = {"remark": f"left out: {options.seconds:g} s are over"}
                if time.perf_counter() - start < options.seconds:
                    row = measure(name, WORKLOADS[workload], dtype, memory)
                if "measured_ms" in row:
                    row["bandwidth_share"] = row["bytes_per_s"] / bandwidth
                report.add(key | row | expected.get(tuple(key.values()), {}))
    note(f"Written to {options.output}")


def measure(name: str, workload: Workload, dtype: str, memory: int) -> Row:
    """Checks and times a program; what goes wrong is a remark of its row."""
    try:
        row = check(name, dtype)
        if not row["rms_error"] <= TOLERANCES[dtype]:  # true of NaN too
            return row | {"remark": "WRONG, not timed"}
        return row | _timed(name, workload, dtype, memory)
    except Exception as error:  # noqa: BLE001 - whatever a device comes up with
        reason = str(error).strip().split("\n")[0][:200]
        return {"remark": f"{type(error).__name__}: {reason}"}


@functools.cache
def check(name: str, dtype: str) -> dict[str, float]:
    """Largest and relative RMS error of a program's results, the worst of them."""
    name, implementation = split_name(name)
    op = OPS[name]
    workload = next(workload for workload in CHECKED if op.fits(workload))
    arguments = random_arguments(name, workload, dtype, seed=0)
    exact = {key: jax.tree.map(_widened, value) for key, value in arguments.items()}
    reference = functools.partial(op.function, implementation="reference")
    with jax.default_matmul_precision("highest"):
        if op.forward:
            before = list(arguments)[: list(arguments).index("y")]
            y, _ = jax.jit(op.forward)(*(exact[key] for key in before))
            arguments["y"] = y.astype(dtype)
        expected = jax.jit(reference)(*exact.values())
    run = functools.partial(op.function, implementation=implementation)
    # float32 products are rounded to less on most devices, unless they are asked not to.
    precision = "highest" if dtype == "float32" else None
    with jax.default_matmul_precision(precision):
        actual = jax.jit(run)(*arguments.values())
    errors = [
        _errors(*pair)
        for pair in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    largest, rms = np.max(errors, axis=0)
    return {"maximum_error": float(largest), "rms_error": float(rms)}


def _widened(array: jax.Array) -> jax.Array:
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(jnp.float32) if floating else array


def _errors(actual: jax.Array, expected: jax.Array) -> tuple[float, float]:
    found, right = (np.asarray(a).astype(np.float64) for a in (actual, expected))
    scale = max(float(np.sqrt(np.mean(right**2))), TINY)
    difference = np.abs(found - right)
    return float(difference.max()), float(np.sqrt(np.mean(difference**2))) / scale


def _timed(name: str, workload: Workload, dtype: str, memory: int) -> Row:
    program = PROGRAMS[name](workload, dtype)
    function, shapes = program
    moved = least_bytes(program)
    row: Row = {"least_bytes": moved}
    results = _bytes(jax.eval_shape(function, *shapes))
    # Another set of results exists while the next call runs.
    needed = moved + results
    if needed < USABLE_MEMORY * memory:
        compiled = jax.jit(function).lower(*shapes).compile()
        analysis = compiled.memory_analysis()
        needed += analysis.temp_size_in_bytes if analysis else 0
    if needed >= USABLE_MEMORY * memory:
        room = f"{needed / 1e9:.3g} of {memory / 1e9:.3g} GB"
        return row | {"remark": f"does not fit: {room}"}
    arguments = random_arguments(split_name(name)[0], workload, dtype, seed=1)
    in_flight = int((USABLE_MEMORY * memory - needed) // results) + 1
    samples = _samples_s(compiled, list(arguments.values()), min(MOST_CALLS, in_flight))
    seconds = statistics.median(samples)
    return row | {
        "measured_ms": 1e3 * seconds,
        "samples_ms": [1e3 * sample for sample in samples],
        "bytes_per_s": moved / seconds,
    }


def _samples_s(
    function: Callable[..., Any], arguments: Sequence[Any], most_calls: int
) -> list[float]:
    """Seconds a call, of samples of several calls."""

    def sample(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    jax.block_until_ready(function(*arguments))
    calls = max(1, min(most_calls, math.ceil(SAMPLE_S / sample(1))))
    sample(calls)
    return [sample(calls) for _ in range(SAMPLES)]


def copy_bandwidths(platform: str, memory: int) -> dict[str, float]:
    """Bytes a second, read and written, by the bytes of the array that is copied."""
    found = {}
    for size in COPY_BYTES.get(platform, ACCELERATOR_COPY_BYTES):
        if 4 * size < memory:
            x = jax.random.uniform(jax.random.key(0), (size // 4,))
            samples = _samples_s(jax.jit(lambda x: x + 1), [x], most_calls=MOST_CALLS)
            found[str(size)] = 2 * size / statistics.median(samples)
    return found


def _memory_bytes(device: Any) -> int:
    """Memory of the device; on a CPU a quarter of the machine's."""
    statistics_ = device.memory_stats() or {}
    if "bytes_limit" in statistics_:
        return statistics_["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _dtypes(device: Any) -> tuple[str, str]:
    """float32 and the device's short one."""
    capability = getattr(device, "compute_capability", None)
    old_gpu = device.platform == "gpu" and capability and float(capability) < 8
    return "float32", "float16" if old_gpu else "bfloat16"


def _expected(estimates: Path) -> dict[tuple[str, ...], Row]:
    """What the compiler said, by the values of `KEY`."""
    if not estimates.exists():
        return {}
    return {
        tuple(row[name] for name in KEY): {"estimated_ms": row["estimated_ms"]}
        for row in json.loads(estimates.read_text())["rows"]
        if "estimated_ms" in row
    }


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
