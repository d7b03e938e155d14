"""Optimized HLO as text: its computations, and what is called, looped over and moved.

Only as much as `estimated_time` needs.
"""

import json
import math
import re
from typing import Any, NamedTuple

DTYPES = {
    "pred": "bool",
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "s8": "int8",
    "u8": "uint8",
    "s16": "int16",
    "s32": "int32",
    "u32": "uint32",
}
"""Names of numpy by those of HLO."""

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(\w+)=(?:%([\w.-]+)|\{(%[\w., %-]+)\})")

Shape = tuple[str, tuple[int, ...]]
"""A name of `DTYPES`, and sizes."""


class Instruction(NamedTuple):
    """One line, or a few.

    Attributes:
      name: of its result.
      shape: of its result, as text.
      opcode: what it does.
      text: all of it.
    """

    name: str
    shape: str
    opcode: str
    text: str

    def called(self) -> dict[str, list[str]]:
        """Computations that it names, by the role they have: body, calls, ..."""
        found = {}
        for role, one, several in _CALLED.findall(self.text):
            found[role] = [one] if one else re.findall(r"%([\w.-]+)", several)
        return found

    def config(self) -> dict[str, Any]:
        """What the compiler decided about it."""
        start = self.text.index("backend_config=") + len("backend_config=")
        return json.JSONDecoder().raw_decode(self.text[start:])[0]


Computations = dict[str, list[Instruction]]


def parse(text: str) -> tuple[str, Computations]:
    """The name of the entry computation, and the instructions of each."""
    entry = name = ""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            found[name] = []
        elif _INSTRUCTION.match(line):
            found[name].append(line)
        elif name and found[name] and line != "}":  # attributes over several lines
            found[name][-1] += line
    return entry, {name: _instructions(lines) for name, lines in found.items()}


def _instructions(lines: list[str]) -> list[Instruction]:
    matches = [match for line in lines if (match := _INSTRUCTION.match(line))]
    return [Instruction(m[1], m[2], m[3], m.string) for m in matches]


def shapes(text: str) -> list[Shape]:
    """All shapes in a text, tuples flattened."""
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(text)
        if dtype in DTYPES
    ]


def shape_bytes(shape: Shape) -> int:
    """Without padding."""
    dtype, sizes = shape
    width = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return math.prod(sizes) * width // 8


def turns(loop: Instruction, computations: Computations) -> int:
    """Of a `while` that counts from 0 to a constant.

    Raises:
      ValueError: it is another kind of loop.
    """
    condition = computations[loop.called()["condition"][0]]
    limits = [
        int(match[1])
        for i in condition
        if (match := re.search(r" constant\((\d+)\)", i.text))
    ]
    comparison = condition[-1].text
    if len(limits) != 1 or "direction=LT" not in comparison:
        raise ValueError(f"{loop.name} is no loop from 0 to a constant: {comparison}")
    return limits[0]
