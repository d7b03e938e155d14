"""The programs of the recurrence that are estimated and measured, and their inputs.

A program is an op, one of its implementations, a workload and a dtype. An op is an entry
of `OPS`; its implementations are those that the op's table has for a platform.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from recurrentgemma.benchmarks.report import Column
from recurrentgemma.kernels.dispatch import Table
from recurrentgemma.kernels.linear_scan import IMPLEMENTATIONS as SCANS
from recurrentgemma.kernels.linear_scan import linear_scan, linear_scan_gradients
from recurrentgemma.kernels.linear_scan.workloads import Workload
from recurrentgemma.kernels.recurrent_step import IMPLEMENTATIONS as STEPS
from recurrentgemma.kernels.recurrent_step import StepParameters, recurrent_step
from recurrentgemma.kernels.rg_lru import IMPLEMENTATIONS as RG_LRUS
from recurrentgemma.kernels.rg_lru import rg_lru, rg_lru_gradients
from recurrentgemma.kernels.rg_lru.gates import Gate

DTYPES = ("float32", "bfloat16")
IMPLEMENTATIONS = {
    "tpu": ("pallas_tpu", "associative", "composed"),
    "gpu": ("pallas_gpu", "chunked", "associative", "composed"),
    "cpu": ("sequential", "chunked", "associative", "composed"),
}
"""Implementations that are worth a row where an op has them, by platform."""
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


def _is_sequence(workload: Workload) -> bool:
    return workload.length > 1


class Op(NamedTuple):
    """Something that has implementations.

    Attributes:
      function: Takes the arguments, and `implementation`.
      arguments: (workload, dtype) -> shapes by name, pytrees, in the function's order.
      table: Table of its implementations; "reference" is among them.
      forward: Reference of `y`, from the arguments before it: for a gradient that is
        given `y` but computes it again in its reference.
      fits: Whether a workload suits this op.
    """

    function: Callable[..., Any]
    arguments: Callable[[Workload, str], Arguments]
    table: Table
    forward: Callable[..., Any] | None = None
    fits: Callable[[Workload], bool] = _is_sequence


def _scan_arguments(workload: Workload, dtype: str) -> Arguments:
    sequence, state = _shapes(workload, dtype)
    return {"x": sequence, "a": sequence, "h0": state}


def _scan_gradient_arguments(workload: Workload, dtype: str) -> Arguments:
    sequence, state = _shapes(workload, dtype)
    return {"a": sequence, "h0": state} | _results(sequence, state)


def _rg_lru_arguments(workload: Workload, dtype: str) -> Arguments:
    sequence, state = _shapes(workload, dtype)
    return {
        "x": sequence,
        "recurrence_logits": sequence,
        "input_logits": sequence,
        "a_param": jax.ShapeDtypeStruct((workload.width,), "float32"),
        "positions": jax.ShapeDtypeStruct((workload.batch, workload.length), "int32"),
        "h0": state,
    }


def _rg_lru_gradient_arguments(workload: Workload, dtype: str) -> Arguments:
    sequence, state = _shapes(workload, dtype)
    return _rg_lru_arguments(workload, dtype) | _results(sequence, state)


def _with_gates_arguments(workload: Workload, dtype: str) -> Arguments:
    arguments = _rg_lru_arguments(workload, dtype)
    width = min(GATE_BLOCK, workload.width)
    kernel = jax.ShapeDtypeStruct((workload.width // width, width, width), dtype)
    bias = jax.ShapeDtypeStruct(kernel.shape[:2], "float32")
    gate = Gate._make((kernel, bias))
    gates = {"recurrence_gate": gate, "input_gate": gate}
    rest = ("a_param", "positions", "h0")
    return {"x": arguments["x"]} | gates | {name: arguments[name] for name in rest}


def _with_gates_gradient_arguments(workload: Workload, dtype: str) -> Arguments:
    sequence, state = _shapes(workload, dtype)
    return _with_gates_arguments(workload, dtype) | _results(sequence, state)


def _step_arguments(workload: Workload, dtype: str) -> Arguments:
    arguments = _with_gates_arguments(workload, dtype)
    batch, _, width = workload
    parameters = StepParameters._make(
        (
            jax.ShapeDtypeStruct((CONV_WIDTH, width), dtype),
            arguments["a_param"],
            arguments["recurrence_gate"],
            arguments["input_gate"],
            arguments["a_param"],
        )
    )
    return {
        "x": jax.ShapeDtypeStruct((batch, width), dtype),
        "parameters": parameters,
        "positions": jax.ShapeDtypeStruct((batch,), "int32"),
        "h": arguments["h0"],
        "conv_state": jax.ShapeDtypeStruct((batch, CONV_WIDTH - 1, width), dtype),
    }


def _shapes(workload, dtype):
    """Shapes of a sequence and of a state."""
    state = jax.ShapeDtypeStruct((workload.batch, workload.width), "float32")
    return jax.ShapeDtypeStruct(workload, dtype), state


def _results(sequence, state) -> Arguments:
    return {"y": sequence, "y_gradient": sequence, "last_gradient": state}


_reference = partial(rg_lru, implementation="reference")
OPS = {
    "linear_scan": Op(linear_scan, _scan_arguments, SCANS),
    "linear_scan gradient": Op(linear_scan_gradients, _scan_gradient_arguments, SCANS),
    "rg_lru": Op(rg_lru, _rg_lru_arguments, RG_LRUS),
    "rg_lru gradient": Op(
        rg_lru_gradients, _rg_lru_gradient_arguments, RG_LRUS, forward=_reference
    ),
    "rg_lru_with_gates": Op(rg_lru, _with_gates_arguments, RG_LRUS),
    "rg_lru_with_gates gradient": Op(
        rg_lru_gradients, _with_gates_gradient_arguments, RG_LRUS, forward=_reference
    ),
    "recurrent_step": Op(
        recurrent_step,
        _step_arguments,
        STEPS,
        fits=lambda workload: workload.length == 1,
    ),
}


def _program(
    workload: Workload, dtype: str, *, op: str, implementation: str
) -> Program:
    shapes = tuple(OPS[op].arguments(workload, dtype).values())
    return partial(OPS[op].function, implementation=implementation), shapes


PROGRAMS: dict[str, Callable[[Workload, str], Program]] = {
    f"{op}: {implementation}": partial(_program, op=op, implementation=implementation)
    for op in OPS
    for implementation in dict.fromkeys(sum(IMPLEMENTATIONS.values(), ()))
    if implementation in OPS[op].table
}
"""Makers of programs by name: (workload, dtype) -> function, shapes of its arguments."""


def split_name(program: str) -> tuple[str, str]:
    """The op and the implementation of a name of `PROGRAMS`."""
    op, implementation = program.split(": ")
    return op, implementation


def programs(platform: str, workload: Workload) -> list[str]:
    """Names of `PROGRAMS` that a workload is for, on a platform of `IMPLEMENTATIONS`."""
    return [
        name
        for name in PROGRAMS
        for op, implementation in [split_name(name)]
        if implementation in IMPLEMENTATIONS[platform] and OPS[op].fits(workload)
    ]


def least_bytes(program: Program) -> int:
    """Bytes of every argument and every result, once."""
    function, shapes = program
    leaves = jax.tree.leaves((shapes, jax.eval_shape(function, *shapes)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def random_arguments(op: str, workload: Workload, dtype: str, seed: int) -> Arguments:
    """Inputs of an op by name, made on the default device."""
    shapes = OPS[op].arguments(workload, dtype)
    made = jax.jit(partial(_random, shapes))(seed)
    return {name: made[name] for name in shapes}  # jit sorts them


def _random(shapes: Arguments, seed: jax.Array) -> Arguments:
    def make(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if jnp.issubdtype(shape.dtype, jnp.integer):
            positions = jnp.arange(shape.shape[-1], dtype=shape.dtype) % DOCUMENT
            return jnp.broadcast_to(positions, shape.shape)
        low, high = RANGES.get(name.split(".")[-1], OTHER_RANGE)
        own = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        values = jax.random.uniform(own, shape.shape, minval=low, maxval=high)
        return values.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)
