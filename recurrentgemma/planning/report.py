"""What a plan prints, and its JSON document."""

import importlib.metadata
from typing import Any

import jax
from jax.sharding import Mesh

from recurrentgemma import __version__
from recurrentgemma.planning import plan as plan_lib
from recurrentgemma.planning.plan import Plan
from recurrentgemma.planning.programs import Workload
from recurrentgemma.planning.topologies import Chip

_GIB = 2**30


def title(model: str, topology: str, mesh: Mesh, chip: Chip) -> str:
    """The first line."""
    return (
        f"{model} on {topology} ({mesh.size} chips, mesh {_axes(mesh)}); chip figures: "
        f"{chip.source}"
    )


def line(plan: Plan) -> str:
    """One program, in a line."""
    program, batch, length = plan.workload
    needs = f"{plan.needed_bytes / _GIB:.2f} of {plan.available_bytes / _GIB:.2f} GiB"
    return (
        f"  {program}, batch {batch}, length {length}: "
        f"{'fits' if plan.fits else 'does not fit'}, {needs} a chip; "
        f"compiled in {plan.lower_s + plan.compile_s:.0f} s"
    )


def summary(plans: list[Plan], over: str | None) -> str:
    """What is known after all programs."""
    chosen = plans[-1] if over is None else plan_lib.best(plans, over)
    if chosen is None:
        return "nothing fits: take more chips, or cut along other axes"
    lines = []
    if over is not None:
        value = getattr(chosen.workload, over)
        refused = [p for p in plans if not p.fits]
        nearest = min((getattr(p.workload, over) for p in refused), default=None)
        beyond = "" if nearest is None else f" ({nearest} does not)"
        lines.append(f"largest {over} tried that fits: {value}{beyond}")
    if chosen.bytes_by_kind is None or not chosen.costs or not chosen.bounds_s:
        return "\n".join([*lines, "the compiler refuses it for want of memory"])
    lines.append("each chip, GiB")
    for kind, size in chosen.bytes_by_kind.items():
        lines.append(f"  {kind:30} {size / _GIB:8.2f}")
    costs = chosen.costs
    lines += ["each chip, a call", f"  {'TFLOP':30} {costs.flops / 1e12:8.3f}"]
    lines.append(f"  {'GB read and written':30} {costs.memory_bytes / 1e9:8.3f}")
    for kind, exchange in costs.exchanges.items():
        sizes = f"{exchange.bytes / 1e9:8.3f} in {exchange.count}"
        lines.append(f"  {'GB ' + kind:30} {sizes}")
    if costs.unknown_loops:
        lines.append(f"  loops of unknown length, counted once: {costs.unknown_loops}")
    lines.append("no call takes less than (a bound, no prediction), ms")
    for cause, seconds in chosen.bounds_s.items():
        lines.append(f"  {cause:30} {seconds * 1e3:8.2f}")
    return "\n".join(lines)


def document(
    model: str,
    topology: str,
    mesh: Mesh,
    chip: Chip,
    plans: list[Plan],
    over: str | None,
) -> dict[str, Any]:
    """Everything, as JSON values."""
    chosen = None if over is None else plan_lib.best(plans, over)
    return {
        "model": model,
        "topology": topology,
        "mesh": dict(mesh.shape),
        "chip": chip._asdict(),
        "versions": {
            "recurrentgemma": __version__,
            "jax": jax.__version__,
            "libtpu": importlib.metadata.version("libtpu"),
        },
        "searched": over,
        "largest": chosen and getattr(chosen.workload, str(over)),
        "plans": [plan.to_dict() for plan in plans],
    }


def file_name(model: str, topology: str, mesh: Mesh, workload: Workload) -> str:
    """Name of the file of a plan."""
    name = model.rstrip("/").rpartition("/")[2]
    parts = (name, workload.program, topology.replace(":", "-"), _axes(mesh))
    return "-".join(parts).replace("=", "").replace(",", "-") + ".json"


def _axes(mesh: Mesh) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
