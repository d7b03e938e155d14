"""The platform compiled for, not the one that traces, picks the implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recurrentgemma.kernels import linear_scan, local_attention, rg_lru
from tests.tolerances import assert_close

PLATFORMS = ["cpu", "cuda", "tpu"]


def lowered(function, *arrays, platform):
    traced = jax.jit(function).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_scan_default_follows_the_platform(platform):
    array = jnp.ones((1, 100, 3))
    text = lowered(linear_scan, array, array, platform=platform)
    assert text.count("stablehlo.while") == (platform == "cpu")
    # What keeps the summaries of groups apart is in the form for GPU alone.
    assert ("stablehlo.optimization_barrier" in text) == (platform == "cuda")
    assert ("tpu_custom_call" in text) == (platform == "tpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_gradients_lower_everywhere(platform):
    """Matrix products take bfloat16 wherever the platform has them."""
    q, k = jnp.ones((1, 8, 2, 4), jnp.bfloat16), jnp.ones((1, 8, 1, 4), jnp.bfloat16)
    positions = jnp.arange(8, dtype=jnp.int32)[None]

    def loss(q, k, a_param):
        out, _ = local_attention(
            q,
            k,
            k,
            positions=positions,
            cache=None,
            window=4,
            scale=1.0,
            soft_cap=None,
        )
        x = out.reshape(1, 8, 8)
        y, _ = rg_lru(x, x, x, a_param, positions)
        return jnp.sum(y.astype(jnp.float32))

    text = lowered(jax.grad(loss, (0, 1, 2)), q, k, jnp.ones(8), platform=platform)
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    for line in products:
        assert ("bf16" in line) == (platform != "cpu"), line


def mesh_of_four():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def recurrence_gradients(implementation):
    def loss(x, a_param):
        positions = jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32), x.shape[:2])
        y, h = rg_lru(x, x, -x, a_param, positions, implementation=implementation)
        z, h = linear_scan(y, jnp.tanh(x), h, implementation=implementation)
        return jnp.sum(z * z) + jnp.sum(h)

    return jax.grad(loss, (0, 1))


def random_inputs(batch=4):
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, 20, 6)).astype(np.float32), np.ones(6, np.float32)


def test_a_kernel_is_sharded_under_a_mesh():
    """Rows over "data", channels over "model"; the same numbers."""
    x, a_param = random_inputs()
    expected = jax.jit(recurrence_gradients("reference"))(x, a_param)
    mesh = mesh_of_four()
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data", None, "model"))
        placed = jax.device_put(x, sharding)
        actual = jax.jit(recurrence_gradients("pallas_tpu"))(placed, a_param)
    for found, wanted in zip(actual, expected, strict=True):
        assert_close(found, wanted, "gradient")


@pytest.mark.parametrize(("batch", "rows"), [(4, 2), (3, 3)])
def test_only_what_divides_is_sharded(batch, rows):
    with jax.set_mesh(mesh_of_four()):
        text = lowered(
            recurrence_gradients(None), *random_inputs(batch), platform="tpu"
        )
    calls = [line for line in text.splitlines() if "@tpu_custom_call" in line]
    assert len(calls) == 4
    assert all(f"tensor<{rows}x20x3xf32>" in line for line in calls)


def test_several_devices_without_a_mesh_in_context():
    """The types of the arguments name the mesh that they lie on."""
    x, a_param = random_inputs()
    mesh = mesh_of_four()
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    text = lowered(recurrence_gradients(None), placed, a_param, platform="tpu")
    calls = [line for line in text.splitlines() if "@tpu_custom_call" in line]
    assert len(calls) == 4
    assert all("tensor<2x20x3xf32>" in line for line in calls)


def test_a_mesh_of_other_names_runs_the_plain_form():
    """Also where channels do not divide."""
    x, a_param = random_inputs()
    for names, size, reason in [
        (("rows", "columns"), 2, "not cut along mesh axis 'rows'"),
        (("data", "tensor"), 4, "channels do not divide by mesh axis 'tensor' of 4"),
    ]:
        mesh = jax.make_mesh((2, size), names, axis_types=(AxisType.Auto,) * 2)
        with jax.set_mesh(mesh):
            text = lowered(recurrence_gradients(None), x, a_param, platform="tpu")
            assert "tpu_custom_call" not in text
            with pytest.raises(NotImplementedError, match=reason):
                jax.jit(recurrence_gradients("pallas_tpu")).trace(x, a_param)


def test_data_and_fsdp_cut_rows_together():
    x, a_param = random_inputs(8)
    names = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        text = lowered(recurrence_gradients(None), x, a_param, platform="tpu")
    calls = [line for line in text.splitlines() if "@tpu_custom_call" in line]
    assert len(calls) == 4
    assert all("tensor<2x20x3xf32>" in line for line in calls)


@pytest.mark.parametrize(
    ("name", "wrong"), [("pallas_tpu", "cuda"), ("pallas_gpu", "tpu")]
)
def test_a_kernel_is_refused_on_another_accelerator(name, wrong):
    x = jnp.ones((1, 100, 3))
    with pytest.raises(NotImplementedError, match=f"not found for platform {wrong}"):
        lowered(lambda x: linear_scan(x, x, implementation=name), x, platform=wrong)
