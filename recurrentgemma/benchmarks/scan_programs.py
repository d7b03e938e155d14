"""The programs of the recurrence that are estimated and measured, and their inputs.

A program is an op of `OPS`, one of its implementations, a workload and a dtype.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr

from recurrentgemma._validation import choice
from recurrentgemma.benchmarks.report import Column
from recurrentgemma.kernels.dispatch import Table
from recurrentgemma.kernels.linear_scan import IMPLEMENTATIONS as SCANS
from recurrentgemma.kernels.linear_scan import linear_scan, linear_scan_gradients
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS, Workload
from recurrentgemma.kernels.recurrent_step import IMPLEMENTATIONS as STEPS
from recurrentgemma.kernels.recurrent_step import StepParameters, recurrent_step
from recurrentgemma.kernels.rg_lru import IMPLEMENTATIONS as RG_LRUS
from recurrentgemma.kernels.rg_lru import rg_lru, rg_lru_gradients
from recurrentgemma.kernels.rg_lru.gates import Gate

DTYPES = ("float32", "bfloat16")
ESTIMATED = ("pallas_tpu", "associative", "composed")
"""Implementations that are worth a row of the estimates for TPU, where an op has them."""
RANGES = {"a": (0.8, 0.999), "a_param": (-6.0, -3.0), "kernel": (-0.1, 0.1)}
"""Ranges of random inputs, by argument: decays near those of trained models."""
OTHER_RANGE = (-2.0, 2.0)
GATE_BLOCK = 256
"""Channels of a diagonal block of the gates, in RecurrentGemma."""
CONV_WIDTH = 4
"""Taps of the convolution before the RG-LRU, in RecurrentGemma."""
DOCUMENT = 200
"""Tokens after which positions start again at 0."""

KEY = ("program", "workload", "dtype", "generation")
"""What tells the rows of these programs apart."""
KEY_COLUMNS = tuple(map(Column, KEY, KEY, (38, 16, 8, 10)))

Arguments = dict[str, Any]
Program = tuple[Callable[..., Any], tuple[Any, ...]]


class Op(NamedTuple):
    """Something that has implementations.

    Attributes:
      function: Takes the arguments, and `implementation`.
      arguments: Names of its arguments, those of `shapes_by_name`, in order.
      table: Table of its implementations; "reference" is among them.
      one_step: Whether it is for workloads of one token, instead of longer ones.
    """

    function: Callable[..., Any]
    arguments: tuple[str, ...]
    table: Table
    one_step: bool = False

    def fits(self, workload: Workload) -> bool:
        """Whether a workload suits this op."""
        return self.one_step == (workload.length == 1)

    def shapes(self, workload: Workload, dtype: str) -> Arguments:
        """Shapes of its arguments by name, pytrees."""
        known = shapes_by_name(workload, dtype)
        return {name: known[name] for name in self.arguments}


def shapes_by_name(workload: Workload, dtype: str) -> Arguments:
    """Shapes of everything that an op may take."""
    batch, length, width = workload
    block = min(GATE_BLOCK, width)

    def array(*shape: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    sequence, state = array(*workload, dtype=dtype), array(batch, width)
    kernel = array(width // block, block, block, dtype=dtype)
    gate = Gate(kernel, array(width // block, block))
    conv_kernel, vector = array(CONV_WIDTH, width, dtype=dtype), array(width)
    return {
        **dict.fromkeys(("x", "a", "y", "y_gradient"), sequence),
        **dict.fromkeys(("recurrence_logits", "input_logits"), sequence),
        **dict.fromkeys(("recurrence_gate", "input_gate"), gate),
        **dict.fromkeys(("h0", "h", "last_gradient"), state),
        "a_param": vector,
        "positions": array(batch, length, dtype="int32"),
        "token": array(batch, width, dtype=dtype),
        "parameters": StepParameters(conv_kernel, vector, gate, gate, vector),
        "position": array(batch, dtype="int32"),
        "conv_state": array(batch, CONV_WIDTH - 1, width, dtype=dtype),
    }


_RESULTS = ("y", "y_gradient", "last_gradient")
_REST = ("a_param", "positions", "h0")
_LOGITS = ("x", "recurrence_logits", "input_logits", *_REST)
_GATES = ("x", "recurrence_gate", "input_gate", *_REST)
_STEP = ("token", "parameters", "position", "h", "conv_state")
OPS = {
    "linear_scan": Op(linear_scan, ("x", "a", "h0"), SCANS),
    "linear_scan gradient": Op(linear_scan_gradients, ("a", "h0", *_RESULTS), SCANS),
    "rg_lru": Op(rg_lru, _LOGITS, RG_LRUS),
    "rg_lru gradient": Op(rg_lru_gradients, (*_LOGITS, *_RESULTS), RG_LRUS),
    "rg_lru_with_gates": Op(rg_lru, _GATES, RG_LRUS),
    "rg_lru_with_gates gradient": Op(rg_lru_gradients, (*_GATES, *_RESULTS), RG_LRUS),
    "recurrent_step": Op(recurrent_step, _STEP, STEPS, one_step=True),
}


def program(
    workload: Workload, dtype: str, *, op: str, implementation: str | None
) -> Program:
    """An op of `OPS` by an implementation, None the default, with its shapes."""
    shapes = tuple(OPS[op].shapes(workload, dtype).values())
    return partial(OPS[op].function, implementation=implementation), shapes


PROGRAMS: dict[str, Callable[[Workload, str], Program]] = {
    f"{op}: {implementation}": partial(program, op=op, implementation=implementation)
    for op in OPS
    for implementation in ESTIMATED
    if implementation in OPS[op].table
}
"""Makers of programs by name: (workload, dtype) -> function, shapes of its arguments."""


def check_workloads(names: Sequence[str]) -> Sequence[str]:
    """The names, if each is one of `WORKLOADS`; else a ValueError."""
    for name in names:
        choice("workloads", name, WORKLOADS)
    return names


def split_name(program: str) -> tuple[str, str]:
    """The op and the implementation of a name of `PROGRAMS`."""
    op, implementation = program.split(": ")
    return op, implementation


def estimated_programs(workload: Workload) -> list[str]:
    """Names of `PROGRAMS` that a workload is for."""
    return [name for name in PROGRAMS if OPS[split_name(name)[0]].fits(workload)]


def least_bytes(program: Program) -> int:
    """Bytes of every argument and every result, once."""
    function, shapes = program
    leaves = jax.tree.leaves((shapes, jax.eval_shape(function, *shapes)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def block_bytes(function: Callable[..., Any], *shapes: Any) -> int:
    """Bytes that the blocks of a function's Pallas kernels transfer, and nothing else.

    A pipelined kernel transfers a block when its index differs from that of the step
    before.
    """
    return _block_bytes(jax.make_jaxpr(function)(*shapes).jaxpr)


def _block_bytes(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            if equation.params["interpret"]:
                continue  # the form for CPU of the same kernel
            grid_mapping = equation.params["grid_mapping"]
            for block in grid_mapping.block_mappings:
                aval = block.transformed_block_aval
                size = math.prod(aval.shape) * aval.dtype.itemsize
                total += _transfers(grid_mapping.grid, block) * size
        else:
            parameters = equation.params.values()
            branches = equation.params.get("branches", ())  # one for each platform
            inner = (getattr(p, "jaxpr", p) for p in (*parameters, *branches))
            total += sum(_block_bytes(p) for p in inner if hasattr(p, "eqns"))
    return total


def _transfers(grid: tuple[int, ...], block: Any) -> int:
    """How often the index of a block changes on the way through the grid."""
    steps = jnp.stack(jnp.unravel_index(jnp.arange(math.prod(grid)), grid), axis=1)
    index_map = block.index_map_jaxpr
    run = partial(eval_jaxpr, index_map.jaxpr, index_map.consts)
    rows = jax.vmap(lambda step: jnp.stack(run(*step)))(steps.astype(jnp.int32))
    indices = np.asarray(rows)
    return 1 + int(np.any(indices[1:] != indices[:-1], axis=1).sum())


def random_arguments(op: str, workload: Workload, dtype: str, seed: int) -> Arguments:
    """Inputs of an op by name, made on the default device."""
    shapes = OPS[op].shapes(workload, dtype)
    made = jax.jit(partial(_random, shapes))(seed)
    return {name: made[name] for name in shapes}  # jit sorts them


def _random(shapes: Arguments, seed: jax.Array) -> Arguments:
    def make(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if jnp.issubdtype(shape.dtype, jnp.integer):
            positions = jnp.arange(shape.shape[-1], dtype=shape.dtype) % DOCUMENT
            return jnp.broadcast_to(positions, shape.shape)
        low, high = RANGES.get(name.split(".")[-1], OTHER_RANGE)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        values = jax.random.uniform(key, shape.shape, minval=low, maxval=high)
        return values.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)
