"""The real TPU compiler takes the ops on four chips: kernels on parts, and exchanges.

Needs the extra `tpu-plan` (libtpu); no TPU.
"""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recurrentgemma.benchmarks import ahead_of_time
from recurrentgemma.kernels import linear_scan, local_attention, meshes, rg_lru
from recurrentgemma.kernels.rg_lru.gates import Gate

if importlib.util.find_spec("libtpu") is None:
    pytest.skip(
        "needs libtpu: pip install 'recurrentgemma[tpu-plan]'", allow_module_level=True
    )

for name, value in ahead_of_time.ENVIRONMENT.items():
    os.environ.setdefault(name, value)

B, T, D, BLOCK = 4, 512, 512, 256
HEAD_DIM = 128
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
AXES = {
    "rows and channels": {"data": 2, "model": 2},
    "time": {"sequence": 4},
}
EXCHANGES = {
    # Gradients of what all rows share.
    "rows and channels": {"all-reduce"},
    # States go along the shards; keys come from the shard before.
    "time": {"all-gather", "all-reduce", "collective-permute"},
}
PARTS = {
    "rows and channels": (B // 2, T, D // 2),
    "time": (B, T // 4, D),
}
"""A device's part of a sequence."""
KERNELS = {
    *("linear_scan", "linear_scan_gradient"),
    *("rg_lru_with_gates", "rg_lru_with_gates_gradient"),
    *("splash_mqa_fwd", "splash_mqa_dq", "splash_mqa_dkv"),
}


def loss(x, gate, a_param, q, k, positions):
    """Of all ops of a sequence."""
    y, _ = rg_lru(x, gate, gate, a_param, positions)
    scanned, _ = linear_scan(y, jax.nn.sigmoid(y.astype(jnp.float32)))
    options = {"window": 100, "scale": 0.1, "soft_cap": None}
    out, _ = local_attention(q, k, k, positions=positions, cache=None, **options)
    return sum(jnp.sum(part.astype(jnp.float32) ** 2) for part in (scanned, out))


def shapes(mesh):
    """The arguments of `loss`, laid out as training lays out activations."""

    def array(letters, *shape, dtype=jnp.bfloat16):
        axes = (
            meshes.dividing_axes(
                mesh.abstract_mesh, meshes.LETTER_ROLES.get(letter), [size]
            )
            for letter, size in zip(letters, shape, strict=True)
        )
        spec = PartitionSpec(*(one or None for one in axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    groups = D // BLOCK
    gate = Gate(
        array("gio", groups, BLOCK, BLOCK, dtype=jnp.float32),
        array("go", groups, BLOCK, dtype=jnp.float32),
    )
    return (
        array("btc", B, T, D),
        gate,
        array("c", D, dtype=jnp.float32),
        array("btnh", B, T, D // HEAD_DIM, HEAD_DIM),
        array("btkh", B, T, 1, HEAD_DIM),
        array("bt", B, T, dtype=jnp.int32),
    )


@pytest.mark.parametrize(
    ("cut", "generation"),
    [
        ("rows and channels", "v5p"),
        pytest.param("time", "v5e", marks=pytest.mark.slow),
    ],
)
def test_kernels_and_exchanges(cut, generation):
    axes = AXES[cut]
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[generation]
    )
    devices = np.array(topology.devices).reshape(tuple(axes.values()))
    mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    run = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))
    text = run.lower(*shapes(mesh)).compile().as_text()
    kernels = re.findall(r"%(\w+?)(?:_segmented|_no_residuals|_residuals|\.)", text)
    assert {*kernels} >= KERNELS
    exchanges = re.findall(
        r" (all-\w+|collective-permute|reduce-scatter)[\w-]*\(", text
    )
    assert {*exchanges} >= EXCHANGES[cut]
    part = ",".join(map(str, PARTS[cut]))
    [call] = re.findall(r"%rg_lru_with_gates\.\d+ = (.*?) custom-call", text)
    assert f"bf16[{part}]" in call
