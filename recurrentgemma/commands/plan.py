"""`recurrentgemma plan`: what a program takes on TPUs, from their compiler alone."""

import json
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma import _tpu_search
from recurrentgemma.commands import UsageError

USAGE = "[MODEL] --topology v5e:4x4 [FLAGS]"
DETAILS = (
    "Compiles a train step, a prefill or a decode step of a model (a preset or a "
    "checkpoint's directory; no weights are read) for TPUs that need not be here, with "
    "their real compiler (extra tpu-plan). Prints and writes whether it fits, the memory "
    "of each chip by kind, operations, bytes moved, exchanges between chips, and what "
    "bounds its time: a bound, no prediction."
)


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model", "recurrentgemma-2b", "a preset or a directory", flag_values=values
    )
    flags.DEFINE_string(
        "topology",
        "v5e:4x4",
        "generation (v5e, v5p, v6e) and shape of the slice",
        flag_values=values,
    )
    flags.DEFINE_string(
        "mesh",
        "fsdp",
        "axes (data, fsdp, tensor, sequence) and number of chips along each, such as "
        "data=2,fsdp=8; one without a number gets the remaining chips",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "program",
        "train",
        ["train", "prefill", "decode"],
        "what is compiled",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch-size",
        None,
        "rows of all chips together (default: one a chip that has rows)",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "length", 8192, "tokens of a row", lower_bound=1, flag_values=values
    )
    flags.DEFINE_enum(
        "search",
        "none",
        ["none", "batch", "length"],
        "find the largest batch or length that fits, from the given one on",
        flag_values=values,
    )
    flags.DEFINE_string("out", "plan", "the folder of the results", flag_values=values)


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise UsageError(f"expected one model, got {len(arguments)}")
    _tpu_search.compile_only()
    import jax

    from recurrentgemma.commands._shared import find_config
    from recurrentgemma.planning import plan, report, topologies
    from recurrentgemma.planning.programs import Workload

    # Programs for chips that are not here cannot be read back from it.
    jax.config.update("jax_enable_compilation_cache", False)
    name = arguments[0] if arguments else values["model"]
    config = find_config(name)
    topology = topologies.find(values["topology"])
    mesh = topologies.make_mesh(topology, values["mesh"])
    chip = topologies.CHIPS[values["topology"].partition(":")[0]]
    available = topologies.memory_bytes(topology)
    batch = values["batch-size"] or topologies.rows(mesh)
    workload = Workload(values["program"], batch, values["length"])
    over = None if values["search"] == "none" else values["search"]
    subject = (config, workload, mesh, chip, available)
    found = [plan.make(*subject)] if over is None else plan.search(*subject, over)
    plans = []
    print(report.title(name, values["topology"], mesh, chip))
    for one in found:
        plans.append(one)
        print(report.line(one), flush=True)
    print(report.summary(plans, over))
    folder = Path(values["out"])
    folder.mkdir(parents=True, exist_ok=True)
    document = report.document(name, values["topology"], mesh, chip, plans, over)
    path = folder / report.file_name(name, values["topology"], mesh, workload)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
