"""The compiler's estimate of a whole program's time, read from its optimized HLO.

The TPU compiler writes beside every fusion, copy and matrix product the cycles that it
expects of it (it chooses tilings by them). They are summed over the entry computation;
the body of a loop counts as often as it runs, of a conditional the longest branch. Two
things have no such number: Pallas kernels, each of which is compiled and profiled alone
(static profile, or every bundle of its loops where the profiler refuses; at least the
bytes of its arguments and results over the bandwidth), and a few gathers, slices
and windows, for which twice the bytes of their results are taken, and nothing where these
stay on the chip. Asynchronous copies are taken as hidden behind what runs meanwhile.

How good these cycles are, beside published peaks: a product of 8192 x 8192 bfloat16
matrices costs 1.1 (v5e, v5p) to 1.4 (v6e) times its peak time; adding two float32 arrays
1.1 to 1.4 times its bytes over the bandwidth, bfloat16 ones 2.5 to 2.8 times, a sum over
everything 4 to 6 times. Programs of many small elementwise steps therefore come out too
slow; kernels with data-dependent branches (attention) too fast, or too slow if refused.
"""

import json
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from recurrentgemma.benchmarks import ahead_of_time, hlo_text
from recurrentgemma.benchmarks.hlo_text import Computations, Instruction, Shape

KERNEL = 'custom_call_target="tpu_custom_call"'
CONFIG = ("custom_call_config", "scoped_memory_configs")
"""Of a kernel: its code, and the on-chip memory that it asks for."""
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "custom-call",  # but for kernels: views, and promises about indices
}
ON_CHIP = r"\w+\[[\d,]*\]\{[^}]*S\(1\)\}"
"""Arrays that never leave the chip."""
ASYNCHRONOUS = ("-start", "-update", "-done")


class Parts(NamedTuple):
    """Seconds that a program is expected to take.

    Attributes:
      products: fusions with a matrix product inside.
      kernels: Pallas calls.
      other: everything else that the compiler estimates.
      guessed: from bytes, where it does not.
    """

    products: float = 0.0
    kernels: float = 0.0
    other: float = 0.0
    guessed: float = 0.0

    def plus(self, more: "Parts", times: int = 1) -> "Parts":
        """With another one, some times."""
        pairs = zip(self, more, strict=True)
        return Parts(*(mine + times * yours for mine, yours in pairs))


class Kernel(NamedTuple):
    """A Pallas call: what its time depends on.

    Attributes:
      config: for the compiler, its code within.
      arguments, results: their shapes.
    """

    config: str
    arguments: tuple[Shape, ...]
    results: tuple[Shape, ...]

    @classmethod
    def of(cls, call: Instruction) -> "Kernel":
        """The kernel that an instruction calls."""
        config = call.config()
        config = {key: config[key] for key in CONFIG if config.get(key)}
        after = call.text.split("operand_layout_constraints={", 1)[1]
        layouts = re.split(r"\}, [a-z_]+=", after, maxsplit=1)[0]
        arguments, results = map(hlo_text.shapes, (layouts, call.shape))
        return cls(json.dumps(config), tuple(arguments), tuple(results))

    def compile_for(self, generation: str) -> Any:
        """Alone, for one chip."""
        arguments, results = (
            [jax.ShapeDtypeStruct(sizes, hlo_text.DTYPES[dtype]) for dtype, sizes in of]
            for of in (self.arguments, self.results)
        )
        call = jax.ffi.ffi_call(
            "tpu_custom_call",
            results,
            custom_call_api_version=1,
            legacy_backend_config=self.config,
        )
        return ahead_of_time.compile_for(generation, call, *arguments)

    def seconds(self, generation: str) -> float:
        """Its static profile, taken in a process of its own, or the bundles that it
        issues where the profiler refuses; at least its bytes."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(self, file)
            file.flush()
            code = (
                "import json\n"
                "from recurrentgemma.benchmarks.estimated_time import Kernel\n"
                f"kernel = Kernel(*json.load(open({file.name!r})))\n"
                f"kernel.compile_for({generation!r})\n"
            )
            try:
                cycles = sum(ahead_of_time.profile(code).cycles.values())
            except RuntimeError as error:
                if ahead_of_time.PROFILER_REFUSES not in str(error):
                    raise
                issued = ahead_of_time.profile(code, cycles=False).issued
                cycles = issued["bundles"] if issued else 0
        chip = ahead_of_time.CHIPS[generation]
        moved = sum(map(hlo_text.shape_bytes, self.arguments + self.results))
        return max(cycles / chip.clock_hz, moved / chip.bytes_per_s)


def estimate(
    text: str, generation: str, kernel_seconds: Callable[[Kernel], float]
) -> Parts:
    """Of a program.

    Args:
      text: its optimized HLO, all computations.
      generation: a name of `ahead_of_time.CHIPS`.
      kernel_seconds: what one Pallas call takes.

    Raises:
      ValueError: it is not to be seen how often a loop runs.
    """
    entry, computations = hlo_text.parse(text)
    chip = ahead_of_time.CHIPS[generation]
    with_product = _with_product(computations)

    def of(name: str) -> Parts:
        total = Parts()
        for instruction in computations[name]:
            total = total.plus(of_instruction(instruction))
        return total

    def of_instruction(instruction: Instruction) -> Parts:
        opcode, called = instruction.opcode, instruction.called()
        if opcode == "while":
            turns = hlo_text.turns(instruction, computations)
            return Parts().plus(of(called["body"][0]), turns)
        if opcode == "conditional":
            roles = [names for role, names in called.items() if "computation" in role]
            return max((of(name) for names in roles for name in names), key=sum)
        if opcode == "call":
            return of(called["to_apply"][0])
        if KERNEL in instruction.text:
            return Parts(kernels=kernel_seconds(Kernel.of(instruction)))
        cycles = re.search(r'"estimated_cycles":"?(\d+)', instruction.text)
        if cycles:
            seconds = int(cycles[1]) / chip.clock_hz
            if with_product & set(called.get("calls", ())):
                return Parts(products=seconds)
            return Parts(other=seconds)
        if opcode in FREE or opcode.endswith(ASYNCHRONOUS):
            return Parts()
        in_hbm = re.sub(ON_CHIP, "", instruction.shape)
        moved = 2 * sum(map(hlo_text.shape_bytes, hlo_text.shapes(in_hbm)))
        return Parts(guessed=moved / chip.bytes_per_s)

    return of(entry)


def _with_product(computations: Computations) -> set[str]:
    """Names of computations with a matrix product inside, at any depth."""
    found = {
        name
        for name, instructions in computations.items()
        if any(i.opcode in ("convolution", "dot") for i in instructions)
    }
    while True:
        more = {
            name
            for name, instructions in computations.items()
            for i in instructions
            if i.opcode == "fusion" and found & set(i.called().get("calls", ()))
        }
        if more <= found:
            return found
        found |= more
