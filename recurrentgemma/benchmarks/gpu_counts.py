"""Launches, turns of loops and bytes of a layer without a kernel, as a GPU would run it.

Counted, not timed: read from what the real GPU compiler makes of a layer of
recurrentgemma-2b over 8192 tokens, on a machine without a GPU. A launch is an
instruction that reads or writes memory; a turn is one of a loop, whose turns wait for
each other. Bytes are those of every instruction's operands and results, of what it only
slices the slices; they are also given as a multiple of the bytes of a sequence.

Needs the CUDA plugin, its compiler, and ptxas: `pip install jax-cuda12-plugin
jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`, the first two of jax's version. `--before
DIRECTORY`, an older checkout, adds rows of that.
"""

import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma._validation import choice
from recurrentgemma.benchmarks import ahead_of_time, gpu_programs
from recurrentgemma.benchmarks.report import Column, Report, Row
from recurrentgemma.planning.hlo import costs_of

PROGRAM = Path(gpu_programs.__file__)
DTYPES = {"T4": ("float32", "float16"), "A100": ("float32", "bfloat16")}
"""What is worth a row, by card."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
COMPILER = ("jax_cuda12_plugin", "nvidia.cuda_nvcc")
KEY = ("card", "dtype", "program", "checkout")
COLUMNS = (
    *(
        Column(name, name, width)
        for name, width in zip(KEY, (5, 9, 23, 8), strict=True)
    ),
    Column("turns", "turns", 6),
    Column("launches", "launches", 9),
    Column("moved MB", "moved_bytes", 9, 1e-6),
    Column("sequences", "sequences", 9),
)


def counts(text: str, dtype: str) -> Row:
    """What a compiled program does, from its text.

    Args:
      text: the text of its optimised HLO.
      dtype: of the sequences.
    """
    costs = costs_of(text)
    width = gpu_programs.BATCH * gpu_programs.LENGTH * gpu_programs.WIDTH
    return {
        "turns": costs.turns,
        "launches": costs.launches,
        "moved_bytes": costs.memory_bytes,
        "sequences": costs.memory_bytes / (width * ITEM_BYTES[dtype]),
        "unknown_loops": costs.unknown_loops,
    }


def compile_programs(card: str, folder: Path, before: str | None) -> None:
    """Writes the compiled programs of a card; of an older checkout, if there is one."""
    [cuda] = importlib.import_module("nvidia.cuda_nvcc").__path__
    call = f"write_programs({card!r}, {DTYPES[card]!r}, {str(folder)!r})"
    ahead_of_time.run(
        f"{PROGRAM.read_text()}\n\n{call}\n",
        path=(before,) if before else (),
        environment={
            "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={cuda} --xla_gpu_autotune_level=0",
            "PATH": os.pathsep.join((os.environ.get("PATH", ""), f"{cuda}/bin")),
        },
    )


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    what = "an older checkout of this project, counted too"
    flags.DEFINE_string("before", None, what, flag_values=values)
    what = f"names among {', '.join(DTYPES)}"
    flags.DEFINE_list("cards", list(DTYPES), what, flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """Counts every program."""
    for name in COMPILER:
        package = name.partition(".")[0]
        if not (importlib.util.find_spec(package) and importlib.util.find_spec(name)):
            raise ValueError(
                f"{name}: expected it to be installed, as a part of the GPU compiler, "
                "got none; pip install jax-cuda12-plugin jax-cuda12-pjrt "
                "nvidia-cuda-nvcc-cu12"
            )
    checkouts: dict[str, tuple[str | None, Row]] = {"this": (None, {})}
    if before := values["before"]:
        older = str(Path(before).absolute()), {"commit": _commit(before)}
        checkouts = {"before": older, **checkouts}
    for card in values["cards"]:
        choice("cards", card, DTYPES)
    report = Report(folder / "gpu_counts.json", COLUMNS, key=KEY)
    for card in values["cards"]:
        for checkout, (path, commit) in checkouts.items():
            with tempfile.TemporaryDirectory() as name:
                compile_programs(card, Path(name), path)
                for file in sorted(Path(name).glob("*.txt")):
                    dtype, _, program = file.stem.partition(" ")
                    key = dict(zip(KEY, (card, dtype, program, checkout), strict=True))
                    report.add(key | counts(file.read_text(), dtype) | commit)


def _commit(checkout: str) -> str:
    command = ["git", "-C", checkout, "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
