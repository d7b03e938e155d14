"""Everything worth knowing about a new device, within 10 minutes, in one JSON document.

First the checks: each op by default and by every name, against the reference on the CPU;
values and gradients, float32 at full precision, bfloat16 and float16, starts of documents
and padding, decays to 1 - 1e-6, 100,000 steps, an array larger than 4 GiB, the same bits
twice. Then the times: the recurrence, the decode step and attention beside the bandwidth
of copies; prefill, decode and a train step of the 2B model with random weights. Last a
verdict for each default: is a right implementation faster?

The pieces run one after the other in another process. One that fails, crashes or takes
too long is a row that says so, and the rest goes on. The same command resumes an
interrupted run. `device.json` is meant to be sent in; `device.md` is the table for the
README. `--size small` rehearses all of it on a CPU.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma.benchmarks.device_suite.pieces import (
    DEFAULT,
    KEY,
    TIME_LIMIT,
    Piece,
)
from recurrentgemma.benchmarks.device_suite.sizes import SIZES
from recurrentgemma.benchmarks.device_suite.verdicts import markdown, verdicts
from recurrentgemma.benchmarks.device_suite.worker import Make, Worker
from recurrentgemma.benchmarks.report import (
    Column,
    Report,
    Row,
    note,
    provenance,
    read_document,
    show,
)

BUDGET_S = 600.0
CONDITIONS = ("benchmark", "size", "device", "versions", "commit")
"""Facts that an earlier document must share, to go on with it."""
COLUMNS = (
    *map(Column, KEY, KEY, (6, 52, 22, 9)),
    Column("status", "status", 13),
    Column("error", "error", 9),
    Column("ms", "measured_ms", 9),
    Column("GB/s", "bytes_per_s", 7, 1e-9),
    Column("tokens/s", "tokens_per_s", 9),
)


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    what = "of everything: full for a GPU or TPU, small to rehearse the suite on a CPU"
    flags.DEFINE_enum("size", "full", list(SIZES), what, flag_values=values)
    what = "seconds after which the run stops; the same command goes on"
    flags.DEFINE_float("seconds", BUDGET_S, what, flag_values=values)
    what = "pieces, by the beginnings of their names, such as 'check rg_lru'"
    flags.DEFINE_list("only", [""], what, flag_values=values)


def everything(size: str) -> tuple[Row, Sequence[Piece]]:
    """Facts of the device that is here, and all pieces of a size of `SIZES`.

    Last are implementations by name in dtypes that models do not have on this device.
    """
    import jax

    config: Any = jax.config
    if config.jax_platforms and "cpu" not in config.jax_platforms.split(","):
        config.update("jax_platforms", f"{config.jax_platforms},cpu")  # for the truth
    # Compilation is a figure of its own: none comes from an earlier process.
    config.update("jax_enable_compilation_cache", False)
    from recurrentgemma.benchmarks import device
    from recurrentgemma.benchmarks.device_suite import checks, model_checks, timings
    from recurrentgemma.config import Runtime

    sizes, platform = SIZES[size], device.platform()
    found = [
        *checks.pieces(sizes, platform),
        *model_checks.pieces(sizes),
        *timings.pieces(sizes, platform),
        *timings.model_pieces(sizes),
    ]
    used = ("float32", Runtime().dtype.name)

    def is_seldom_used(piece: Piece) -> bool:
        return piece.implementation != DEFAULT and piece.dtype not in used

    facts = provenance() | {
        "platform": platform,
        "devices": jax.device_count(),
        "memory_bytes": device.memory_bytes(),
        "truth": checks.truth_device().platform,
    }
    return facts, sorted(found, key=is_seldom_used)


def run(values: dict[str, Any], folder: Path, make: Make | None = None) -> None:
    """Runs the pieces that are left, as long as the time allows.

    Args:
      values: by flag name.
      folder: where document, table and log go.
      make: gives facts and pieces, in another process; None is `everything`.

    Raises:
      ValueError: the folder holds results of another device, size, version or commit;
        no piece has such a name; or the size is none for this device.
      WorkerError: nothing can run on this device, or nothing more; finished pieces are
        kept.
    """
    deadline = time.monotonic() + values["seconds"]
    worker = Worker(make or partial(everything, values["size"]), folder / "device.log")
    try:
        facts = {"benchmark": "device", "size": values["size"]} | worker.facts
        if facts["platform"] == "cpu" and facts["size"] == "full":
            raise ValueError(
                "--size: expected a GPU or a TPU for full, got a CPU; choose small, or "
                "another jax (pip install '.[cuda12]', '.[tpu]')"
            )
        path = folder / "device.json"
        rows = _earlier_rows(path, facts)
        report = Report(path, COLUMNS, key=KEY, rows=rows, origin=facts)
        chosen = [
            (index, key, limit_s)
            for index, (key, limit_s) in enumerate(worker.pieces)
            if " ".join(key.values()).startswith(tuple(values["only"]))
        ]
        if not chosen:
            raise ValueError(
                f"--only: expected beginnings of names such as "
                f"{' '.join(worker.pieces[0][0].values())!r}, got "
                f"{','.join(values['only'])}"
            )
        missing = [piece for piece in chosen if not report.has(piece[1])]
        done = _run_pieces(worker, report, missing, deadline)
    finally:
        worker.close()
    found = verdicts(report.rows)
    report.facts |= {"verdicts": found, "left": len(missing) - done}
    report.write()
    page = markdown(report.facts, report.rows, found, len(missing) - done)
    (folder / "device.md").write_text(page, encoding="utf-8")
    show(page)
    note(f"Written to {path} and {folder / 'device.md'}")


def _run_pieces(
    worker: Worker,
    report: Report,
    missing: Sequence[tuple[int, Row, float]],
    deadline: float,
) -> int:
    """The number of pieces that have a row now."""
    for count, (index, key, limit_s) in enumerate(missing):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return count
        row = worker.run(index, min(limit_s, remaining))
        if row["status"] == TIME_LIMIT and remaining < limit_s:
            return count  # It may still succeed: the next run begins with it.
        report.add(key | row)
    return len(missing)


def _earlier_rows(path: Path, facts: Row) -> list[Row]:
    if not path.exists():
        return []
    document = read_document(path)
    for name in CONDITIONS:
        if document.get(name) != facts[name]:
            raise ValueError(
                f"{path}: expected results with {name} {facts[name]}, got "
                f"{document.get(name)}; name another folder with --out, or remove it"
            )
    return document["rows"]
