"""The recurrence's programs on the device that is here: are they right, how fast are they.

The device's copy bandwidth comes first: x + 1 over large arrays, read and written once.
Then each program of the platform, dtype and workload: it is compared with the op's
`reference` in float32 on a small shape; if it agrees, it is timed. The bandwidth of a
row is that of its least bytes: every argument read once and every result written once;
what fits a cache may be faster than copies.

What does not fit the memory, cannot run here or is wrong says so in its row. The file
of a TPU or a GPU is meant to be sent in.
"""

import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from recurrentgemma.benchmarks import device
from recurrentgemma.benchmarks.report import Column, Report, Row, note
from recurrentgemma.benchmarks.scan_programs import (
    KEY,
    KEY_COLUMNS,
    OPS,
    PROGRAMS,
    check_workloads,
    least_bytes,
    programs,
    random_arguments,
    split_name,
)
from recurrentgemma.config import Runtime
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
MOST_CALLS = 100
"""Largest number of calls in a sample."""
USABLE_MEMORY = 0.9
COLUMNS = (
    *KEY_COLUMNS,
    Column("least MB", "least_bytes", 8, 1e-6),
    Column("rms error", "rms_error", 9),
    Column("measured ms", "measured_ms", 11),
    Column("GB/s", "bytes_per_s", 8, 1e-9),
    Column("of copy %", "bandwidth_share", 9, 100),
)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    what = f"names of shapes: {', '.join(WORKLOADS)}; by default some for the device"
    flags.DEFINE_list("workloads", None, what, flag_values=values)
    what = "seconds after which no other program is measured"
    flags.DEFINE_float("seconds", BUDGET_S, what, flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """Measures the programs of the device that is here."""
    start = time.perf_counter()
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    usual = MEASURED_ON_CPU if platform == "cpu" else MEASURED
    workloads = check_workloads(values["workloads"] or usual)
    memory = device.memory_bytes()
    copies = device.copy_bytes_per_s(memory)
    bandwidth = max(copies.values())
    note(f"{kind}: copies {bandwidth / 1e9:.4g} GB/s")
    path = folder / "scan.json"
    report = Report(
        path,
        COLUMNS,
        key=KEY,
        memory_bytes=memory,
        copy_bytes_per_s=copies,
    )
    for workload in workloads:
        for dtype in _dtypes():
            for name in programs(platform, WORKLOADS[workload]):
                key = dict(zip(KEY, (name, workload, dtype, kind), strict=True))
                row: Row = {"remark": f"left out: {values['seconds']:g} s are over"}
                if time.perf_counter() - start < values["seconds"]:
                    row = measure(name, WORKLOADS[workload], dtype, memory)
                if "measured_ms" in row:
                    row["bandwidth_share"] = row["bytes_per_s"] / bandwidth
                report.add(key | row)
    note(f"Written to {path}")


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
    samples = device.seconds_per_call(
        compiled, *arguments.values(), most_calls=min(MOST_CALLS, in_flight)
    )
    seconds = statistics.median(samples)
    return row | {
        "measured_ms": 1e3 * seconds,
        "samples_ms": [1e3 * sample for sample in samples],
        "bytes_per_s": moved / seconds,
    }


def _dtypes() -> tuple[str, str]:
    """float32 and the device's short one."""
    short = Runtime().dtype.name
    return "float32", "bfloat16" if short == "float32" else short


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
