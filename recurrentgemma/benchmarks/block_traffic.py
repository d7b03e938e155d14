"""What the blocks of a program's Pallas kernels transfer between HBM and the chip.

A pipelined kernel transfers a block when its index differs from that of the step before.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr


def block_bytes(function: Callable[..., Any], *shapes: Any) -> int:
    """Bytes of all transfers of a function's kernels, and of nothing else.

    Args:
      function: Calls ops of `recurrentgemma.kernels`, with a kernel by name.
      *shapes: Shapes of its arguments.
    """
    return _bytes(jax.make_jaxpr(function)(*shapes).jaxpr)


def _bytes(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            if equation.params["interpret"]:
                continue  # the form for CPU of the same kernel
            grid_mapping = equation.params["grid_mapping"]
            for block in grid_mapping.block_mappings:
                total += _transfers(grid_mapping.grid, block) * _block_size(block)
        else:
            parameters = equation.params.values()
            branches = equation.params.get("branches", ())  # one for each platform
            inner = (getattr(p, "jaxpr", p) for p in (*parameters, *branches))
            total += sum(_bytes(p) for p in inner if hasattr(p, "eqns"))
    return total


def _transfers(grid: tuple[int, ...], block: Any) -> int:
    """How often the index of a block changes on the way through the grid."""
    steps = jnp.stack(jnp.unravel_index(jnp.arange(math.prod(grid)), grid), axis=1)
    index_map = block.index_map_jaxpr
    run = partial(eval_jaxpr, index_map.jaxpr, index_map.consts)
    rows = jax.vmap(lambda step: jnp.stack(run(*step)))(steps.astype(jnp.int32))
    indices = np.asarray(rows)
    return 1 + int(np.any(indices[1:] != indices[:-1], axis=1).sum())


def _block_size(block: Any) -> int:
    aval = block.transformed_block_aval
    return math.prod(aval.shape) * aval.dtype.itemsize
