"""From the start of a process to the first token: what a command or a notebook waits for.

A new process imports the package, makes a model of random weights, reads a prompt of
`length` tokens and writes one. Three times each: without JAX's persistent compilation
cache, with an empty one, and with one that an earlier process has filled. Columns: the
time to the first token of the three, and how much of it the import took.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recurrentgemma import cost
from recurrentgemma.benchmarks.models import Subject, check_memory
from recurrentgemma.benchmarks.picture import Panel, lines_of
from recurrentgemma.benchmarks.report import Column, Row
from recurrentgemma.benchmarks.sweep import Point, Sweep

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json, sys, time
config, dtype, batch, length, start = json.loads(sys.argv[1])
from recurrentgemma import GriffinConfig, Runtime, Sampler
from recurrentgemma.benchmarks.models import random_model
imported = time.time()
runtime = Runtime(compute_dtype=dtype)
model = random_model(GriffinConfig.from_dict(config), runtime)
made = time.time()
sampler = Sampler(model, compile_ahead=False)
sampler([[1] * length] * batch, max_new_tokens=1, end_tokens=[])
print(json.dumps([imported - start, made - imported, time.time() - made]))
"""
MODES = ("no_cache", "empty_cache", "filled_cache")


def measure(subject: Subject, point: Point, values: dict[str, Any]) -> Row:
    """Starts three processes for each sample."""
    del values
    size = cost.parameter_bytes(subject.config, subject.runtime.dtype)
    check_memory(size, subject.memory)
    samples: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    for _ in range(point.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for mode in MODES:
                samples[mode].append(_seconds(subject, point, mode, folder))
    found: Row = {"samples_s": samples}
    for mode in MODES:
        found[f"{mode}_s"] = statistics.median(map(sum, samples[mode]))
    imports = [sample[0] for mode in MODES for sample in samples[mode]]
    return found | {"import_s": statistics.median(imports)}


def _seconds(subject: Subject, point: Point, mode: str, folder: str) -> list[float]:
    """Seconds of the import, of the model, and to the first token after that."""
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if mode != "no_cache":
        cache = {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        }
    config = subject.config.to_dict()
    start = time.time()
    request = json.dumps([config, point.dtype, point.batch, point.length, start])
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE, request],
        env={**os.environ, "PYTHONPATH": str(ROOT), **cache},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"a new process failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def panels(rows: list[Row]) -> list[Panel]:
    """A part for each state of the cache."""
    return [
        Panel("tokens", f"s to the first token, {mode}", lines_of(rows, f"{mode}_s"))
        for mode in MODES
    ]


SWEEP = Sweep(
    "start",
    measure,
    lengths="16",
    columns=(
        *(Column(mode.replace("_", " ") + " s", f"{mode}_s", 14) for mode in MODES),
        Column("import s", "import_s", 9),
    ),
    panels=panels,
)
define_flags, run = SWEEP.define_flags, SWEEP.run
