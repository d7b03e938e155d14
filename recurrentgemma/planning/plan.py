"""Whether a program fits a topology, what bounds its time, and the largest that fits.

The compiler's refusals and sizes are its own answers. Times are bounds, not predictions:
no program takes less than its products at the peak rate, its bytes at the memory's
bandwidth or its exchanges at that of the links, and real ones take more.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from recurrentgemma.config import GriffinConfig
from recurrentgemma.planning import hlo, programs
from recurrentgemma.planning.programs import Workload
from recurrentgemma.planning.topologies import Chip, Refusal
from recurrentgemma.training.sharding import BATCH

MAX_COMPILATIONS = 5
"""Programs that a search compiles at most, besides the first."""
SEARCHED = ("batch", "length")
"""Fields of a `Workload` that a search may enlarge."""
_CROSSINGS = {"all-reduce": 2}
"""How often an array crosses the links; a sum is scattered, then gathered. Others: 1."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of a program; every figure is for each chip.

    Attributes:
      workload: What it does.
      available_bytes: Memory of a chip that a program may use.
      needed_bytes: Memory that the program needs; arguments that become results count
        once.
      bytes_by_kind: The same by kind; None where the compiler refused it.
      costs: Operations, bytes and exchanges; None likewise.
      bounds_s: Least seconds by what bounds them; None likewise.
      lower_s: Seconds of tracing and lowering.
      compile_s: Seconds of compilation.
    """

    workload: Workload
    available_bytes: int
    needed_bytes: int
    bytes_by_kind: dict[str, int] | None
    costs: hlo.Costs | None
    bounds_s: dict[str, float] | None
    lower_s: float
    compile_s: float

    @property
    def fits(self) -> bool:
        """Whether the compiler takes the program."""
        return self.bytes_by_kind is not None

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        fields = dataclasses.asdict(self)
        fields["workload"] = self.workload._asdict()
        if self.costs is not None:
            exchanges = {k: e._asdict() for k, e in self.costs.exchanges.items()}
            fields["costs"] = self.costs._asdict() | {"exchanges": exchanges}
        return {"fits": self.fits, **fields}


def make(
    config: GriffinConfig, workload: Workload, mesh: Mesh, chip: Chip, available: int
) -> Plan:
    """Compiles one program.

    Args:
      config: the model.
      workload: what the program does.
      mesh: of the chips of a topology.
      chip: what is published of them.
      available: memory of a chip, from `topologies.memory_bytes`.
    """
    start = time.perf_counter()
    lowered = programs.lower(config, workload, mesh)
    lower_s, start = time.perf_counter() - start, time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:  # JAX has no common type for what the compiler refuses.
        refused = Refusal.of(error)
        if refused is None:
            raise
        compile_s = time.perf_counter() - start
        sizes = (refused.available_bytes, refused.needed_bytes)
        return Plan(workload, *sizes, None, None, None, lower_s, compile_s)
    compile_s = time.perf_counter() - start
    sizes = compiled.memory_analysis()
    by_kind = {
        "arguments": sizes.argument_size_in_bytes,
        "results that are no arguments": sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    costs = hlo.costs_of(compiled.as_text())
    return Plan(
        workload,
        available,
        sum(by_kind.values()),
        by_kind,
        costs,
        bounds(costs, chip),
        lower_s,
        compile_s,
    )


def bounds(costs: hlo.Costs, chip: Chip) -> dict[str, float]:
    """Least seconds of a program, by what bounds them."""
    crossed = sum(
        exchange.bytes * _CROSSINGS.get(kind, 1)
        for kind, exchange in costs.exchanges.items()
    )
    return {
        "products": costs.flops / chip.flops_per_s,
        "memory": costs.memory_bytes / chip.memory_bytes_per_s,
        "links": crossed / chip.link_bytes_per_s,
    }


def search(
    config: GriffinConfig,
    workload: Workload,
    mesh: Mesh,
    chip: Chip,
    available: int,
    over: str,
) -> Iterator[Plan]:
    """Compiles for larger and larger, or smaller, batches or lengths.

    What a program needs grows about linearly, so that two programs tell where the limit
    is, and one more or two confirm it.

    Args:
      config, mesh, chip, available: as for `make`.
      workload: where to begin.
      over: the field of the workload that changes, a name of `SEARCHED`.

    Yields:
      Every plan, in the order in which they were made.
    """
    unit = _unit(mesh, workload, over)
    plans: dict[int, Plan] = {}
    count: int | None = max(1, getattr(workload, over) // unit)
    while count is not None and len(plans) <= MAX_COMPILATIONS:
        tried = workload._replace(**{over: count * unit})
        plans[count] = make(config, tried, mesh, chip, available)
        yield plans[count]
        count = next_count(
            {n: plan.needed_bytes for n, plan in plans.items()}, available
        )


def next_count(needed: dict[int, int], available: int) -> int | None:
    """The number of units to try next, from what those tried need; None to stop."""
    fitting = [n for n, size in needed.items() if size <= available]
    refused = [n for n, size in needed.items() if size > available]
    low, high = max(fitting, default=0), min(refused, default=None)
    if high == low + 1:
        return None
    if len(needed) == 1:  # As if all of it grew, which is the least that may fit.
        [(n, size)] = needed.items()
        guess = n * available // size
    else:
        # The line through the two nearest to the limit.
        (a, size_a), (b, size_b) = sorted(
            needed.items(), key=lambda pair: abs(pair[1] - available)
        )[:2]
        slope = (size_b - size_a) / (b - a)
        guess = math.floor(a + (available - size_a) / slope) if slope > 0 else 2 * low
    most = 2**62 if high is None else high - 1
    return min(max(guess, low + 1), most)


def best(plans: list[Plan], over: str) -> Plan | None:
    """The largest plan that fits, if any does."""
    fitting = [plan for plan in plans if plan.fits]
    return max(fitting, key=lambda plan: getattr(plan.workload, over), default=None)


def _unit(mesh, workload, over):
    """The least step of a batch or a length that lies evenly on the mesh."""
    rows, tokens = (math.prod(mesh.shape.get(axis, 1) for axis in dim) for dim in BATCH)
    if over == "batch":
        return rows
    return math.lcm(tokens, 1024 if workload.length >= 1024 else 1)
