"""RG-LRU: gates, decay, normalised input and linear scan as one op.

A gate comes as its parameters, and its block-diagonal product is part of the op, or as
the product itself. The gradient computes everything but the states again, so that
nothing but the arguments and the result is kept for it.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.checks import (
    check_arrays,
    check_implementation,
    check_sequence,
)
from recurrentgemma.kernels.dispatch import (
    EVERYWHERE,
    Implementation,
    Op,
    call,
    gradient,
    imported_late,
)
from recurrentgemma.kernels.linear_scan import (
    GPU_DTYPES,
    LINEAR_SCAN,
    TPU_DTYPES,
    takes_one_step,
)
from recurrentgemma.kernels.linear_scan.block_sizes import LANES, gate_block_sizes
from recurrentgemma.kernels.rg_lru import composed, reference
from recurrentgemma.kernels.rg_lru.gates import (
    Gate,
    count_blocks,
    expected_gate,
    logits,
    with_products,
)

PALLAS_TPU, PALLAS_GPU = f"{__name__}.pallas_tpu", f"{__name__}.pallas_gpu"
PALLAS_TPU_WITH_GATES = f"{__name__}.with_gates_pallas_tpu"


def rg_lru(
    x: jax.Array,
    recurrence_gate: Gate | jax.Array,
    input_gate: Gate | jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array | None = None,
    *,
    implementation: str | None = None,
    linear_scan: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Real-gated linear recurrent unit.

    With r and i the sigmoids of the gates' logits and
    a_t = exp(-8 softplus(a_param) r_t):  y_t = a_t y_{t-1} + sqrt(1 - a_t^2) i_t x_t.
    Arithmetic and carry are float32. The derivative of the square root is bounded by
    1000. Differentiable in every floating-point argument, through both results.

    Args:
      x: inputs [B, T, E], floating point.
      recurrence_gate, input_gate: parameters of the gates, kernels [G, E / G, E / G]
        and biases [G, E / G], whose products with x run in x's dtype and accumulate in
        float32; or the logits of both, floating point [B, T, E].
      a_param: Lambda of the paper [E], float32.
      positions: int32 [B, T]. At 0 a document starts: the state before it is forgotten
        and the input enters with factor 1. At a negative position the state is held
        (padding) and y is finite.
      h0: state before the first step [B, E], float32; None is zero.
      implementation: name of `IMPLEMENTATIONS`; None is the best for the platform.
      linear_scan: name of `linear_scan.IMPLEMENTATIONS` for the scan of the
        implementation "composed"; None is the best for the platform.

    Returns:
      y: [B, T, E] in x's dtype.
      h_last: the state after the last step [B, E], float32.

    Raises:
      ValueError: shapes or dtypes do not fit.
      NotImplementedError: the named implementation does not exist or cannot run.

    Source: Griffin, arXiv 2402.19427, section 2.4; RecurrentGemma, arXiv 2404.07839.
    """
    gates = {"recurrence_gate": recurrence_gate, "input_gate": input_gate}
    _validate(x, gates, a_param, positions, h0)
    if linear_scan is not None:
        check_implementation("linear_scan", linear_scan, LINEAR_SCAN.table)
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
    arguments = (x, recurrence_gate, input_gate, a_param, positions, h0)
    return call(
        _op(recurrence_gate), implementation, *arguments, linear_scan=linear_scan
    )


def rg_lru_gradients(
    x: jax.Array,
    recurrence_gate: Gate | jax.Array,
    input_gate: Gate | jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array,
    y: jax.Array,
    y_gradient: jax.Array,
    last_gradient: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[Any, ...]:
    """Gradients of the arguments of `rg_lru`, None for positions.

    Args:
      x, recurrence_gate, input_gate, a_param, positions, h0: its arguments.
      y: its result.
      y_gradient: gradient of y [B, T, E], in y's dtype.
      last_gradient: gradient of h_last [B, E], float32.
      implementation: as of `rg_lru`.
    """
    return gradient(
        _op(recurrence_gate),
        implementation,
        (x, recurrence_gate, input_gate, a_param, positions, h0),
        (y, None),
        (y_gradient, last_gradient),
        linear_scan=None,
    )


def _supports(takes, *arguments, linear_scan):
    if linear_scan is not None:
        return f"linear_scan={linear_scan!r} is for the implementation 'composed'"
    return takes(*arguments)


def _supports_one_step(*arguments, linear_scan):
    return _supports(takes_one_step, *arguments, linear_scan=linear_scan)


def _supports_kernels_for_tpu(x, recurrence_gate, *arguments, linear_scan):
    if isinstance(recurrence_gate, Gate):
        width = recurrence_gate.kernel.shape[1]
        if width % LANES:
            return f"blocks of the gates must be multiples of {LANES} wide, not {width}"
        if gate_block_sizes(x.shape, width, x.dtype.itemsize, gradient=True) is None:
            return f"a gate block of {width} channels does not fit in on-chip memory"
        return _supports(TPU_DTYPES, x, linear_scan=linear_scan)
    arguments = (x, recurrence_gate, *arguments)
    return _supports(TPU_DTYPES, *arguments, linear_scan=linear_scan)


def _kernel(module, *arguments, linear_scan, **interpret):
    """A kernel that takes logits."""
    del linear_scan
    x, recurrence_gate, input_gate, a_param, positions, h0 = arguments
    gates = logits(x, recurrence_gate), logits(x, input_gate)
    kernel = imported_late(module, "recurrence")
    return kernel(x, *gates, _rows(a_param, h0), positions, h0, **interpret)


@with_products
def _kernel_gradient(arguments, results, upstream, *, module, linear_scan, **interpret):
    del linear_scan
    *inputs, a_param, positions, h0 = arguments
    kernel = imported_late(module, "gradients")
    *gradients, of_a_param, of_h0 = kernel(
        *inputs, _rows(a_param, h0), positions, h0, results[0], *upstream, **interpret
    )
    return *gradients, jnp.sum(of_a_param, axis=0), None, of_h0


def _kernel_for_tpu(*arguments, linear_scan, **interpret):
    x, recurrence_gate, input_gate, a_param, positions, h0 = arguments
    if not isinstance(recurrence_gate, Gate):
        return _kernel(PALLAS_TPU, *arguments, linear_scan=linear_scan, **interpret)
    kernel = imported_late(PALLAS_TPU_WITH_GATES, "recurrence")
    gates = (*recurrence_gate, *input_gate)
    return kernel(x, *gates, _rows(a_param, h0), positions, h0, **interpret)


def _kernel_for_tpu_gradient(arguments, results, upstream, *, linear_scan, **interpret):
    x, *gates, a_param, positions, h0 = arguments
    if not isinstance(gates[0], Gate):
        return _kernel_gradient(
            arguments, results, upstream,
            module=PALLAS_TPU, linear_scan=linear_scan, **interpret,
        )  # fmt: skip
    kernel = imported_late(PALLAS_TPU_WITH_GATES, "gradients")
    of_x, *of_parameters, of_h0 = kernel(
        *(x, *gates[0], *gates[1], _rows(a_param, h0), positions, h0),
        *(results[0], *upstream),
        **interpret,
    )
    # Those of the parameters come for each row.
    parameters = (*gates[0], *gates[1], a_param)
    *of_gates, of_a_param = (
        jnp.sum(found, axis=0).astype(parameter.dtype)
        for found, parameter in zip(of_parameters, parameters, strict=True)
    )
    return of_x, Gate(*of_gates[:2]), Gate(*of_gates[2:]), of_a_param, None, of_h0


def _rows(a_param, h0):
    """[E] as [B, E]: kernels take what belongs to a row from arrays with rows."""
    return jnp.broadcast_to(a_param[None], h0.shape)


def _from_logits(module, platform, dtypes, **fields):
    return Implementation(
        partial(_kernel, module),
        partial(_kernel_gradient, module=module),
        kernel_for=platform,
        supports=partial(_supports, dtypes),
        **fields,
    )


IMPLEMENTATIONS = {
    "one_step": Implementation(
        reference.one_step, default_on=EVERYWHERE, supports=_supports_one_step
    ),
    "pallas_tpu": Implementation(
        _kernel_for_tpu,
        _kernel_for_tpu_gradient,
        kernel_for="tpu",
        default_on=("tpu",),
        supports=_supports_kernels_for_tpu,
    ),
    "pallas_tpu_from_logits": _from_logits(
        PALLAS_TPU, "tpu", TPU_DTYPES, default_on=("tpu",)
    ),
    "composed": Implementation(
        composed.recurrence, composed.gradients, default_on=EVERYWHERE
    ),
    "pallas_gpu": _from_logits(PALLAS_GPU, "cuda", GPU_DTYPES),
    "reference": Implementation(
        reference.recurrence, supports=partial(_supports, lambda *_: None)
    ),
}
"""The kernel "pallas_tpu" has the products inside, where the gates come as parameters;
"pallas_tpu_from_logits" takes any blocks, after the products."""
FROM_LOGITS = Op("rg_lru", "btc,btc,btc,c,bt,bc->btc,bc", IMPLEMENTATIONS)
FROM_GATES = dataclasses.replace(FROM_LOGITS, dims="btc,gio,go,gio,go,c,bt,bc->btc,bc")


def _op(gate):
    return FROM_GATES if isinstance(gate, Gate) else FROM_LOGITS


def _validate(x, gates, a_param, positions, h0) -> None:
    check_sequence(x, "B, T, E")
    batch, length, width = x.shape
    expected = {
        "x": (x, x.shape, jnp.floating),
        "a_param": (a_param, (width,), jnp.floating),
        "positions": (positions, (batch, length), jnp.integer),
    }
    if h0 is not None:
        expected["h0"] = (h0, (batch, width), jnp.float32)
    if len({isinstance(gate, Gate) for gate in gates.values()}) > 1:
        raise ValueError(
            "input_gate: expected parameters or logits like recurrence_gate, got the "
            "other of both; pass two Gates or two arrays."
        )
    for name, gate in gates.items():
        if isinstance(gate, Gate):
            groups = count_blocks("recurrence_gate", gates["recurrence_gate"])
            expected |= expected_gate(name, gate, groups, width)
        else:
            expected[name] = (gate, x.shape, jnp.floating)
    check_arrays(expected)
