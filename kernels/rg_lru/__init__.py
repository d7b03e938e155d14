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

from recurrentgemma.kernels import sharded
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
    Inputs,
    expected_gates,
    from_logits,
)
from recurrentgemma.kernels.tpu_chips import chip_of


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
    options = {}
    if linear_scan is not None:
        implementation = _that_scans(implementation, linear_scan)
        options = {"linear_scan": linear_scan}
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
    inputs = Inputs(x, recurrence_gate, input_gate, a_param, positions, h0)
    return call(_op(recurrence_gate), implementation, inputs, **options)


def _that_scans(implementation, linear_scan) -> str:
    """The implementation that takes the name of a scan."""
    check_implementation("linear_scan", linear_scan, LINEAR_SCAN.table)
    if implementation is None:
        return "composed"
    check_implementation("implementation", implementation, IMPLEMENTATIONS)
    if implementation != "composed":
        raise NotImplementedError(
            f"rg_lru: {implementation} cannot run: linear_scan={linear_scan!r} is for "
            "the implementation 'composed'; leave the choice to implementation=None."
        )
    return implementation


def rg_lru_gradients(*arrays: Any, implementation: str | None = None) -> Inputs:
    """Gradients of the arguments of `rg_lru`, None for positions.

    Args:
      *arrays: its arguments, h0 included; its result y; the gradients of y [B, T, E], in
        y's dtype, and of h_last [B, E], float32.
      implementation: as of `rg_lru`.
    """
    *arguments, y, y_gradient, last_gradient = arrays
    inputs, upstream = Inputs(*arguments), (y_gradient, last_gradient)
    op = _op(inputs.recurrence_gate)
    (found,) = gradient(op, implementation, (inputs,), (y, None), upstream)
    return found


def _supports_kernels_for_tpu(inputs):
    gate = inputs.recurrence_gate
    if not isinstance(gate, Gate):
        return TPU_DTYPES(inputs)
    width = gate.kernel.shape[1]
    if width % LANES:
        return f"blocks of the gates must be multiples of {LANES} wide, not {width}"
    x = inputs.x
    sizes = (x.shape, width, x.dtype.itemsize)
    if gate_block_sizes(*sizes, gradient=True, chip=chip_of(x)) is None:
        return f"a gate block of {width} channels does not fit in on-chip memory"
    return TPU_DTYPES(x)


def _kernel(module, platform, supports, **fields):
    functions = (
        imported_late(f"{__name__}.{module}", name)
        for name in ("recurrence", "gradients")
    )
    return Implementation(*functions, kernel_for=platform, supports=supports, **fields)


IMPLEMENTATIONS = {
    "one_step": Implementation(
        reference.one_step, default_on=EVERYWHERE, supports=takes_one_step
    ),
    "pallas_tpu": _kernel(
        "with_gates_pallas_tpu", "tpu", _supports_kernels_for_tpu, default_on=("tpu",)
    ),
    "pallas_tpu_from_logits": _kernel(
        "pallas_tpu", "tpu", TPU_DTYPES, default_on=("tpu",)
    ),
    "pallas_gpu": _kernel("pallas_gpu", "cuda", GPU_DTYPES, default_on=("cuda",)),
    "composed": Implementation(
        composed.recurrence, composed.gradients, default_on=EVERYWHERE
    ),
    "reference": Implementation(reference.recurrence),
}
"""The kernel "pallas_tpu" has the products inside, where the gates come as parameters;
"pallas_tpu_from_logits" takes any blocks, after the products."""


def _on_shards(recurrence, axis, inputs, **options):
    del options
    scanned = reference.scan_inputs(from_logits(inputs))
    start = sharded.start_state(*scanned, inputs.h0, axis)
    y, h = recurrence(inputs._replace(h0=start))
    return y, sharded.last_state(h, axis)


def _sample(dtype, *, gates):
    """Two chunks, a start of a document in the second, and padding at the end."""
    wave = jnp.sin(jnp.arange(2 * 300 * 40, dtype=jnp.float32)).reshape(2, 300, 40)
    x = wave.astype(dtype)
    step = jnp.arange(300, dtype=jnp.int32)
    position = jnp.where(step < 200, step + 1, step - 200)
    position = jnp.broadcast_to(jnp.where(step < 290, position, -1), (2, 300))
    pair = 3 * x[:, ::-1], -x
    if gates:
        pair = [
            Gate(x[0, :40].reshape(2, 20, 40)[..., i::2], x[:, i, :20]) for i in (0, 1)
        ]
    return (Inputs(x, *pair, jnp.linspace(-6.0, 1.0, 40), position, wave[:, 0]),), {}


FROM_LOGITS = Op(
    "rg_lru",
    "btc,btc,btc,c,bt,bc->btc,bc",
    IMPLEMENTATIONS,
    sample=partial(_sample, gates=False),
    on_shards=_on_shards,
)
FROM_GATES = dataclasses.replace(
    FROM_LOGITS,
    dims="btc,gio,go,gio,go,c,bt,bc->btc,bc",
    sample=partial(_sample, gates=True),
)


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
    if isinstance(gates["recurrence_gate"], Gate):
        expected |= expected_gates(gates, width)
    else:
        expected |= {name: (g, x.shape, jnp.floating) for name, g in gates.items()}
    check_arrays(expected)
