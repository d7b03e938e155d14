"""Programs around the scan of the official recurrentgemma 1.0.1, compiled for TPU.

Run by `recurrentgemma.benchmarks.scan` as a text, in a process where the name
`recurrentgemma` is the official package: nothing of ours can be imported here.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

common = importlib.import_module("recurrentgemma.common")
layers = importlib.import_module("recurrentgemma.jax.layers")
official = importlib.import_module("recurrentgemma.jax.scan")


def scan(x, a, h0):
    return official.linear_scan(
        x=x, a=a, h0=h0, scan_type=common.ScanType.LINEAR_PALLAS
    )


def scan_and_gradient(x, a, h0, y_gradient, last_gradient):
    _, pull_back = jax.vjp(scan, x, a, h0)
    return pull_back((y_gradient, last_gradient))


def gates_and_scan(x, recurrence_logits, input_logits, a_param, positions, h0):
    """The arithmetic of the official RG-LRU after the products of its gates."""
    log_a = -8.0 * jax.nn.sigmoid(recurrence_logits)
    log_a = log_a * jax.nn.softplus(a_param.astype(x.dtype))[None, None]
    reset = (positions == 0).astype(x.dtype)[..., None]
    root = layers.sqrt_bound_derivative(1 - jnp.exp(2 * log_a), 1000)
    multiplier = reset + (1 - reset) * root
    gated = x * jax.nn.sigmoid(input_logits) * multiplier.astype(x.dtype)
    return scan(gated, jnp.exp(log_a) * (1 - reset), h0)


def gates_and_scan_and_gradient(x, r, i, a_param, positions, h0, dy, d_last):
    def run(x, r, i, a_param, h0):
        return gates_and_scan(x, r, i, a_param, positions, h0)

    _, pull_back = jax.vjp(run, x, r, i, a_param, h0)
    return pull_back((dy, d_last))


def compile_for(topology, name, batch, length, width, dtype):
    """Compiles one of the functions above for a chip."""
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(description.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    sequence = shape(batch, length, width)
    state = shape(batch, width, dtype="float32")
    arguments = {
        "scan": (sequence, sequence, state),
        "scan_and_gradient": (sequence, sequence, state, sequence, state),
    }
    gates = (
        *[sequence] * 3,
        shape(width, dtype="float32"),
        shape(batch, length, dtype="int32"),
        state,
    )
    arguments["gates_and_scan"] = gates
    arguments["gates_and_scan_and_gradient"] = (*gates, sequence, state)
    return jax.jit(globals()[name]).lower(*arguments[name]).compile()
