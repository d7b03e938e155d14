"""What a compiled program does on each chip, read from its text (HLO).

The compiler's own cost analysis counts the body of a loop once. Here a loop counts as
often as it turns, where the compiler knows that. Counted are the products (and what
kernels say of themselves), the bytes that instructions read from and write to the memory,
and the bytes of every exchange between chips.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "while", "conditional", "call"}

_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
"""What writes a part of its first operand: place of the operand that is written."""
_PARTIAL = {"dynamic-slice", "slice", "gather", *_IN_PLACE}
"""What reads or writes a part of its first operand."""


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


class Exchange(NamedTuple):
    """What the chips exchange in one way."""

    count: int
    bytes: int


class Costs(NamedTuple):
    """What a program does on each chip.

    Attributes:
      flops: Number of floating-point operations of products.
      memory_bytes: Bytes read from and written to memory.
      exchanges: What is exchanged, by collective.
      unknown_loops: Number of loops of unknown length, which count once.
      launches: Number of instructions that read or write memory: on a GPU each is a
        launch of a kernel, or of a few.
      turns: Number of turns of all loops, which depend on each other.
    """

    flops: int
    memory_bytes: int
    exchanges: dict[str, Exchange]
    unknown_loops: int
    launches: int
    turns: int


def costs_of(text: str) -> Costs:
    """The costs of a program, from the text of its optimised HLO."""
    computations, entry = _parse(text)
    totals: dict[str, int] = defaultdict(int)
    exchanges: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    unknown: set[str] = set()

    def visit(name: str, times: int, in_memory: bool) -> None:
        table = computations[name]
        for one in table.values():
            totals["flops"] += times * _flops(one, table)
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                exchanges[kind][0] += times
                exchanges[kind][1] += times * _sent_bytes(one, table)
            if in_memory:
                totals["bytes"] += times * _moved_bytes(one, table, computations)
                totals["launches"] += times * (not _is_free(one))
            turns = 1
            if one.opcode == "while":
                found = _turns(one, computations)
                turns = 1 if found is None else found
                totals["turns"] += times * turns
                if found is None:
                    unknown.add(one.name)
            is_control = one.opcode in ("while", "conditional", "call")
            is_inner = is_control or one.opcode in ("fusion", "async-start")
            if is_inner:
                for inner in _called(one):
                    visit(inner, times * turns, in_memory and is_control)

    visit(entry, 1, True)
    found = {kind: Exchange(*pair) for kind, pair in sorted(exchanges.items())}
    return Costs(
        totals["flops"],
        totals["bytes"],
        found,
        len(unknown),
        totals["launches"],
        totals["turns"],
    )


def _parse(text):
    """Instructions by name of each computation by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, table = "", {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            is_entry = line.startswith("ENTRY")
            name = line.removeprefix("ENTRY ").split("(")[0].strip().lstrip("%")
            table = computations[name] = {}
            entry = name if is_entry else entry
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            operands, attributes = _split_operands(rest)
            table[name] = Instruction(name, shape, opcode, operands, attributes)
    return computations, entry


def _split_operands(rest):
    """Names of the operands, and the attributes after them."""
    depth = 1
    for end, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            inner = rest[:end]
            if inner.isdecimal():  # The index of a parameter, or a constant.
                return (inner,), rest[end + 1 :]
            return tuple(re.findall(r"%([\w.\-]+)", inner)), rest[end + 1 :]
    return (), rest


def _turns(one, computations):
    """How often a loop turns: as the compiler notes it, or as long as a counter that
    begins with 0 is below a constant; None if neither is so."""
    if noted := _TURNS.search(one.rest):
        return int(noted[1])
    found = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", one.rest)
    if found is None:
        return None
    condition, body = (computations.get(name, {}) for name in found.groups())
    for test in condition.values():
        if test.opcode == "compare" and "direction=LT" in test.rest:
            counter, limit = (condition.get(name) for name in test.operands)
            if limit is None or limit.opcode != "constant" or counter is None:
                return None
            step = _step(counter, body)
            return step and -(-int(limit.operands[0]) // step)
    return None


def _step(counter, body):
    """What a turn adds to the counter, an element of the tuple that goes round."""
    element = re.search(r"index=(\d+)", counter.rest)
    root = [*body.values()][-1]
    if element is None or root.opcode != "tuple":
        return None

    def added(name):
        one = body.get(name)
        if one is None or one.opcode == "get-tuple-element":
            return 0
        if one.opcode == "constant":
            return int(one.operands[0]) if one.operands else 0
        return sum(map(added, one.operands)) if one.opcode in ("add", "copy") else 0

    return added(root.operands[int(element[1])]) or None


def _called(one):
    if branches := _BRANCHES.search(one.rest):
        return re.findall(r"%?([\w.\-]+)", branches[1])[:1]  # They are alternatives.
    return _CALLED.findall(one.rest)


def _arrays(shape, in_memory=False):
    """Dtype and dimensions of every array of a shape; those in memory alone."""
    for dtype, dims, layout in _ARRAY.findall(shape):
        # S(1) and above are on-chip memories.
        if dtype in _ITEM_BYTES and not (in_memory and re.search(r"S\([1-9]", layout)):
            yield dtype, [int(size) for size in dims.split(",") if size]


def _bytes(shape, in_memory=True):
    return sum(
        _ITEM_BYTES[dtype] * math.prod(dims)
        for dtype, dims in _arrays(shape, in_memory)
    )


def _flops(one, table):
    if one.opcode == "custom-call" and '"cost_estimate"' in one.rest:
        found = re.search(r'"cost_estimate":\{"flops":"?(\d+)', one.rest)
        return int(found[1]) if found else 0
    if one.opcode not in ("dot", "convolution"):
        return 0
    [(_, out)] = list(_arrays(one.shape))[:1]
    left = next(iter(_arrays(table[one.operands[0]].shape)))[1]
    if one.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        contracted = [int(i) for i in found[1].split(",") if i] if found else []
        return 2 * math.prod(out) * math.prod(left[i] for i in contracted)
    right = next(iter(_arrays(table[one.operands[1]].shape)))[1]
    return _convolution_flops(one.rest, left, right, out)


def _convolution_flops(rest, left, right, out):
    """2 for each product of an input with a weight; padding is none."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    if labels is None:
        return 0
    lhs, rhs, result = labels.groups()
    window = _window(rest)
    products = out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
    for axis, letter in enumerate(sorted(set(result) - {"b", "f"})):
        size, stride, low, dilation, kernel_dilation = window.get(axis, (1, 1, 0, 1, 1))
        inputs, outputs = left[lhs.index(letter)], out[result.index(letter)]
        products *= _valid_positions(
            inputs, outputs, size, stride, low, dilation, kernel_dilation
        )
    groups = re.search(r"batch_group_count=(\d+)", rest)
    return 2 * products // (int(groups[1]) if groups else 1)


def _window(rest):
    """Size, stride, padding before, dilation of inputs and of weights, by axis."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    if found is None:
        return {}
    fields = dict(part.split("=") for part in found[1].split())
    axes = range(len(fields["size"].split("x")))

    def numbers(name, default):
        values = fields[name].split("x") if name in fields else [default] * len(axes)
        return [int(value.split("_")[0]) for value in values]

    columns = (
        numbers("size", "1"),
        numbers("stride", "1"),
        numbers("pad", "0_0"),
        numbers("lhs_dilate", "1"),
        numbers("rhs_dilate", "1"),
    )
    return {axis: tuple(column[axis] for column in columns) for axis in axes}


def _valid_positions(inputs, outputs, size, stride, low, dilation, kernel_dilation):
    """Number of pairs of an output and a weight that meet an input."""
    reach = (inputs - 1) * dilation
    count = 0
    for k in range(size):
        # Outputs o with 0 <= o * stride + offset <= reach, on a multiple of dilation.
        offset = k * kernel_dilation - low
        if dilation == 1:
            first = max(0, -(offset // stride))
            last = min(outputs - 1, (reach - offset) // stride)
            count += max(0, last - first + 1)
        else:
            places = range(offset, offset + outputs * stride, stride)
            count += sum(0 <= p <= reach and p % dilation == 0 for p in places)
    return count


def _sent_bytes(one, table):
    """Bytes of the array that is gathered, added or sent: the larger of both ends."""
    sent = sum(
        _bytes(table[name].shape, False) for name in one.operands if name in table
    )
    received = [math.prod(d) * _ITEM_BYTES[t] for t, d in _arrays(one.shape)]
    if one.opcode.endswith("-start"):  # A tuple of operands and results.
        received = received[len(one.operands) :][: len(one.operands)]
    return max(sent, sum(received))


def _is_free(one):
    return one.opcode in _FREE or one.opcode.endswith("-done")


def _moved_bytes(one, table, computations):
    if _is_free(one):
        return 0
    shapes = [table[name].shape if name in table else "" for name in one.operands]
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _bytes(one.shape)
    if one.opcode in _IN_PLACE:
        return 2 * _bytes(shapes[_IN_PLACE[one.opcode]])
    if one.opcode == "slice-start":  # A tuple of the whole, the slice and a signal.
        [_, (dtype, dims), *_] = _arrays(one.shape)
        [_, in_memory, *_] = _memory_flags(one.shape)
        return (1 + in_memory) * _ITEM_BYTES[dtype] * math.prod(dims)
    if one.opcode.endswith("-start"):
        return _bytes(one.shape)
    if one.opcode == "custom-call" and '"cost_estimate"' in one.rest:
        found = re.search(r'"bytes_accessed":"?(\d+)', one.rest)
        if found:
            return int(found[1])
    if one.opcode == "fusion":
        return _fusion_bytes(one, shapes, computations)
    return _bytes(one.shape) + sum(map(_bytes, shapes))


def _fusion_bytes(one, shapes, computations):
    """Operands and results of a fusion: of what it only slices, the slices; of what it
    writes in place, the part that it writes."""
    inner = computations[_called(one)[0]]
    users: dict[str, list[Instruction]] = defaultdict(list)
    for part in inner.values():
        for operand in part.operands:
            users[operand].append(part)

    def uses(name):
        for user in users[name]:
            yield from uses(user.name) if user.opcode == "bitcast" else [(name, user)]

    moved = 0
    for part in inner.values():
        if part.opcode != "parameter":
            continue
        whole = _bytes(shapes[int(part.operands[0])])
        found = list(uses(part.name))
        if all(u.opcode in _PARTIAL and u.operands[0] == name for name, u in found):
            parts = (user for _, user in found if user.opcode not in _IN_PLACE)
            whole = min(whole, sum(_bytes(user.shape, False) for user in parts))
        moved += whole
    return moved + sum(_written_bytes(one.shape, inner))


def _written_bytes(shape, inner):
    """Bytes of each result of a fusion."""
    root = [*inner.values()][-1]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    kept = [_bytes(f"{d}[{','.join(map(str, dims))}]") for d, dims in _arrays(shape)]
    in_memory = [*_memory_flags(shape)]
    for i, name in enumerate(results):
        while name in inner and inner[name].opcode == "bitcast":
            name = inner[name].operands[0]
        if not in_memory[i]:
            continue
        if name in inner and inner[name].opcode in _IN_PLACE:
            update = inner[name].operands[_IN_PLACE[inner[name].opcode]]
            yield _bytes(inner[update].shape, False) if update in inner else kept[i]
        else:
            yield kept[i]


def _memory_flags(shape):
    """Of each array of a shape, whether it lies in memory, not on the chip."""
    for dtype, _, layout in _ARRAY.findall(shape):
        if dtype in _ITEM_BYTES:
            yield not re.search(r"S\([1-9]", layout)
