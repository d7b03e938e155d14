"""Programs around the scan of the official recurrentgemma 1.0.1, compiled for TPU.

Run by `recurrentgemma.benchmarks.scan_estimates` as a text, in a process where the name
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


def linear_scan(x, a, h0):
    return official.linear_scan(
        x=x, a=a, h0=h0, scan_type=common.ScanType.LINEAR_PALLAS
    )


def rg_lru(x, recurrence_logits, input_logits, a_param, positions, h0):
    """The arithmetic of the official RG-LRU after the products of its gates."""
    log_a = -8.0 * jax.nn.sigmoid(recurrence_logits)
    log_a = log_a * jax.nn.softplus(a_param.astype(x.dtype))[None, None]
    reset = (positions == 0).astype(x.dtype)[..., None]
    root = layers.sqrt_bound_derivative(1 - jnp.exp(2 * log_a), 1000)
    multiplier = reset + (1 - reset) * root
    gated = x * jax.nn.sigmoid(input_logits) * multiplier.astype(x.dtype)
    return linear_scan(gated, jnp.exp(log_a) * (1 - reset), h0)


def with_gradient(function):
    """The gradients in all arguments, from those of the results, given after them."""

    def run(results, *arguments):
        _, pull_back = jax.vjp(function, *arguments)
        gradients = pull_back(results)
        return [g for g in gradients if g.dtype != jax.dtypes.float0]  # of positions

    return run


def compile_for(topology, name, gradient, arguments):
    """Compiles one of the functions above for a chip.

    Args:
      topology: Name of the topology.
      name: `linear_scan` or `rg_lru`.
      gradient: Whether to compile the gradients too.
      arguments: Shape and dtype of each argument.
    """
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(description.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(*both, sharding=sharding) for both in arguments]
    function = globals()[name]
    if gradient:
        results = shapes[0], shapes[-1]  # like x and h0
        return jax.jit(with_gradient(function)).lower(results, *shapes).compile()
    return jax.jit(function).lower(*shapes).compile()
