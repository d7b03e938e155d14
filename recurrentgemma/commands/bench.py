"""`recurrentgemma bench`: every measurement, a sub-command for each question.

A sub-command is a module of `recurrentgemma.benchmarks` and a line in `SUB_COMMANDS`, and
one in `MODULES` if their names differ. Its docstring is what `--help` shows; it has

    define_flags(values)      defines its flags in an absl FlagValues, besides --out
    run(values, folder)       measures; writes into the folder of --out
"""

import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags

from recurrentgemma.commands import UsageError

SUB_COMMANDS = {
    "prefill": "reading a prompt, and the time to the first token",
    "decode": "writing, against the number of tokens read before",
    "throughput": "the best tokens/s over batch sizes within a memory",
    "memory": "bytes of model and cache, and the longest text that fits",
    "train": "a train step",
    "long_gradients": "exact gradients of a row of up to a million tokens",
    "start": "from the start of a process to the first token",
    "compare": "results over each other, and where one overtakes another",
    "device": "every op and a model on this device: right, how fast, best default",
    "gpu_blocks": "block choices of the recurrence's kernels for this GPU, swept",
    "scan_estimates": "the recurrence's kernels as the TPU compiler sees them",
    "gpu_counts": "launches and bytes of a layer without a kernel, as a GPU runs it",
    "sampler": "finished rows replaced, and a draft model, against plain sampling",
    "versus": "beside the official package, transformers and older checkouts",
    "recall": "what a fixed-size state costs: small models trained on recall tasks",
    "forgetting": "what models remember of a long text",
    "quantization": "int8 matrices: loss, bytes and speed of the decode step",
    "adapters": "fine-tuning on small instructions: adapters beside all parameters",
    "needle": "facts that models find again in long texts, by distance and length",
    "few_shot": "examples of a task read once, against read with each question",
    "post_training": "500 steps that teach a model to read beyond its rows",
    "held_out": "bits a byte on the held-out files of nano's corpus",
}
MODULES = {"device": "device_suite"}
USAGE = "QUESTION [FLAGS]"
DETAILS = (
    "Measures this device. `recurrentgemma bench QUESTION --help` says what a question "
    "means, how it is measured, and its flags. Each prints a table and writes a JSON "
    "document that holds every sample."
)


def define_flags(values: flags.FlagValues) -> None:
    """None: each question has flags."""


def run(values: dict[str, Any], arguments: list[str]) -> None:
    raise UsageError(
        f"expected a question, one of {', '.join(SUB_COMMANDS)}, got "
        f"{arguments[0] if arguments else 'none'}"
    )


def sub_command(name: str) -> SimpleNamespace:
    """The command of a name of `SUB_COMMANDS`."""
    module = importlib.import_module(
        f"recurrentgemma.benchmarks.{MODULES.get(name, name)}"
    )

    def define_flags(values: flags.FlagValues) -> None:
        flags.DEFINE_string(
            "out", "bench", "the folder of the results", flag_values=values
        )
        module.define_flags(values)

    def run(values: dict[str, Any], arguments: list[str]) -> None:
        usage = getattr(module, "USAGE", "[FLAGS]")
        if arguments and usage == "[FLAGS]":
            raise UsageError(f"unexpected argument {arguments[0]!r}")
        import jax

        # Compilation is a figure of its own: none comes from an earlier process.
        jax.config.update("jax_enable_compilation_cache", False)
        module.run(values | {"arguments": arguments}, _folder(values["out"]))

    return SimpleNamespace(
        USAGE=getattr(module, "USAGE", "[FLAGS]"),
        DETAILS=str(module.__doc__),
        define_flags=define_flags,
        run=run,
    )


def _folder(out: str) -> Path:
    """The folder of the results, which exists and can be written.

    Raises:
      ValueError: it cannot.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {folder} is no folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out: nothing can be written in {folder}")
    return folder
