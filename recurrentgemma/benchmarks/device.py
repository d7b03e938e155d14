"""The device of a measurement: its name, its memory, and the rates that it reaches.

Prefill and training are bound by matrix products, decode by reading every parameter once
a step, scans by copies. The rates of XLA's plain programs for these three are the
ceilings that stand beside a measured figure.
"""

import math
import os
import platform as machine
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma.config import GriffinConfig

SAMPLES = 7
SAMPLE_S = 0.1
"""Least duration of a sample, if `most_calls` allows it."""
PRODUCT_ROWS = 1024
"""Rows of the matrix product: a chunk of prefill."""
WORKING_SET_BYTES = 1 << 28
"""Bytes of the weights that a few rows are multiplied with. No cache holds them, so that
they come from memory, as in decode."""
MOST_MATRICES = 64
"""All matrices are in one program; thousands of tiny ones take gigabytes to compile."""
CPU_COPY_BYTES = (2**24,)
COPY_BYTES = (2**26, 2**28, 2**30)
KIBIBYTE = 1024


def name() -> str:
    """The name of jax's device; on a CPU that of the processor."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else machine.processor() or machine.machine()


def platform() -> str:
    """A name of `jax.lax.platform_dependent`: "cpu", "tpu", "cuda" or "rocm"."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    version = jax.devices()[0].client.platform_version.lower()
    return "rocm" if "rocm" in version else "cuda"


def memory_bytes() -> int:
    """Memory that a program may use: the device's; on a CPU half of the machine's."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def seconds_per_call(
    function: Callable[..., Any], *arguments: Any, most_calls: int = 100
) -> list[float]:
    """Durations of a call, each the mean over a sample of calls.

    Calls are dispatched back to back between two waits, so that the host's part is
    hidden where a call takes longer than its dispatch.
    """

    def sample(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    sample(1)
    calls = max(1, min(most_calls, math.ceil(SAMPLE_S / sample(1))))
    sample(calls)
    return [sample(calls) for _ in range(SAMPLES)]


def copy_bytes_per_s(memory: int) -> dict[str, float]:
    """Rate of x + 1, bytes read and written, by the bytes of the array x."""
    sizes = CPU_COPY_BYTES if jax.default_backend() == "cpu" else COPY_BYTES
    found = {}
    for size in sizes:
        if 4 * size < memory:
            x = jax.random.uniform(jax.random.key(0), (size // 4,))
            samples = seconds_per_call(jax.jit(lambda x: x + 1), x)
            found[str(size)] = 2 * size / statistics.median(samples)
    return found


def rates(
    config: GriffinConfig, batches: Sequence[int], dtype: str
) -> dict[str, float]:
    """Best rates of matrix products of a model's shapes.

    Args:
      config: the model.
      batches: numbers of rows that are multiplied with weights from memory.
      dtype: of all operands.

    Returns:
      product_flops_per_s, of 1024 rows, and for each batch N read_N_rows_bytes_per_s.
    """

    def matrix(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape, dtype)

    x = matrix(max(PRODUCT_ROWS, *batches), config.width)
    w = matrix(config.width, config.mlp_width)
    seconds = min(seconds_per_call(jax.jit(jnp.matmul), x[:PRODUCT_ROWS], w))
    found = {"product_flops_per_s": 2 * PRODUCT_ROWS * w.size / seconds}

    count = max(1, min(WORKING_SET_BYTES // w.nbytes, MOST_MATRICES))
    weights = [w + i for i in range(count)]

    @jax.jit
    def read_all(x, weights):
        return sum(jnp.sum(x @ w) for w in weights)

    for batch in batches:
        seconds = min(seconds_per_call(read_all, x[:batch], weights))
        found[f"read_{batch}_rows_bytes_per_s"] = count * w.nbytes / seconds
    return found


def reset_peak() -> None:
    """Starts the high-water mark of this process's memory again (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes() -> int | None:
    """Largest memory since `reset_peak`: the process's on a CPU, else the device's, whose
    mark never falls; None if it is not known."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * KIBIBYTE if found else None
