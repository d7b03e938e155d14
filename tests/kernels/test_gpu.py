"""When a kernel for GPU is chosen without a name: what the cards say, what it shows."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.backend import backends

from recurrentgemma.kernels import dispatch, gpu
from recurrentgemma.kernels.dispatch import EVERYWHERE, Implementation, Op

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4)


def double(x):
    return (x + x,)


def doubling_op(kernel, calls=None):
    """An op of a plain form, and of a "kernel" that is not Pallas, in float32."""

    def forward(x, interpret=False):
        if calls is not None:
            calls.append((x.shape, interpret))
        return kernel(x)

    def gradient(arguments, results, upstream, interpret=False):
        del arguments, results, interpret
        return kernel(upstream[0])

    return Op(
        "double",
        "btc->btc",
        {
            "fast": Implementation(
                forward, gradient, kernel_for="cuda", default_on=("cuda",)
            ),
            "plain": Implementation(double, default_on=EVERYWHERE),
        },
        sample=lambda dtype: ((jnp.asarray(X, dtype),), {}),
    )


def cards(monkeypatch, *capabilities):
    """This CPU, with GPUs of these compute capabilities beside it."""
    found = [SimpleNamespace(compute_capability=text) for text in capabilities]
    monkeypatch.setattr(gpu, "devices", lambda: found)
    version = gpu.capability()
    monkeypatch.setattr(gpu, "capability", lambda: version)
    monkeypatch.setattr(gpu, "devices", lambda: jax.devices("cpu")[:1])


def program(op, platform="cuda", dtype="float32"):
    """What is lowered for a platform: the kernel multiplies by a constant of its own."""
    traced = jax.jit(lambda x: dispatch.call(op, None, x)).trace(jnp.asarray(X, dtype))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def by_two(x):
    return ((2.0 * x).astype(x.dtype),)


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        ([], False),
        (["7.0"], False),
        (["7.5"], False),
        (["8.0"], True),
        (["8.9"], True),
        (["10.3"], True),
        (["9.0", "7.5"], False),
        ([None], False),
    ],
)
def test_the_oldest_card_decides(capabilities, chosen, monkeypatch):
    """A card of another maker says no capability, and one of several may be older."""
    cards(monkeypatch, *capabilities)
    op = doubling_op(by_two)
    assert ("multiply" in program(op)) == chosen
    for platform in ("cpu", "tpu", "rocm"):
        assert "multiply" not in program(op, platform)


def fails(x):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (lambda x: (2.01 * x,), "off by 0.005"),
        (lambda x: (x / 0,), "off by"),
        (fails, "RuntimeError: no such instruction"),
    ],
)
def test_a_kernel_that_does_not_work_is_not_chosen(kernel, reason, monkeypatch, caplog):
    """It says so once, and by name it still runs."""
    cards(monkeypatch, "9.0")
    op = doubling_op(kernel)
    for _ in range(2):
        assert "add" in program(op)
    assert [reason in message for message in caplog.messages] == [True]
    if kernel is not fails:
        y = dispatch.call(op, "fast", jnp.asarray(X))[0]
        assert not np.allclose(y, 2 * X)


def test_a_wrong_gradient_is_seen(monkeypatch, caplog):
    cards(monkeypatch, "9.0")
    op = doubling_op(by_two)

    def wrong(*_, interpret=False):
        del interpret
        return (jnp.zeros((1, 3, 4)),)

    table = op.table | {
        "fast": Implementation(
            op.table["fast"].forward, wrong, kernel_for="cuda", default_on=("cuda",)
        )
    }
    op = Op("double", op.dims, table, sample=op.sample)
    assert "multiply" not in program(op)
    assert "off by 1 of" in caplog.text


def test_a_kernel_shows_itself_once_for_each_dtype(monkeypatch):
    """Inside traces and meshes of any kind, which it does not see."""
    cards(monkeypatch, "8.0")
    calls = []
    op = doubling_op(by_two, calls)
    mesh = jax.make_mesh((2,), ("data",))
    with jax.set_mesh(mesh), jax.default_matmul_precision("bfloat16"):
        for dtype in ("float32", "bfloat16", "float32"):
            program(op, dtype=dtype)
    shown = [shape for shape, interpret in calls if interpret]
    assert len(shown) == 2, calls


def test_no_back_end_is_made_for_a_gpu():
    """Not by asking, and not by lowering for one, where jax has been given CPUs."""
    assert gpu.devices() == ()
    assert gpu.capability() is None
    for platform in ("cuda", "tpu", "cpu"):
        program(doubling_op(by_two), platform)
    assert set(backends()) == {"cpu"}
