"""The module for Tunix in colabs/README.md does what Tunix's trainer needs."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from recurrentgemma.adapters import add_adapters, remove_adapters
from tests.models import forward, random_model, random_tokens, tiny_config
from tests.tolerances import assert_close

README = Path(__file__).parents[2] / "colabs" / "README.md"
MASK = jnp.array([[0, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
KEPT = 4
"""Tokens of the responses, at the ends of the rows."""
TOKENS = random_tokens(MASK.shape)


@pytest.fixture(scope="module")
def base():
    pattern = ("recurrent", "local_attention")
    return random_model(tiny_config(num_layers=2, block_pattern=pattern))


@pytest.fixture(scope="module")
def wrapper():
    if not hasattr(nnx, "Dict"):
        pytest.skip("Tunix needs flax 0.12")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    [source] = [block for block in blocks if "class ForTunix" in block]
    scope: dict[str, Any] = {}
    exec(source, scope)  # noqa: S102
    return scope["ForTunix"]


def log_probs(model):
    """Of the last tokens, from the call, positions and mask of Tunix's DPO trainer."""
    counts = jnp.cumsum(MASK, axis=-1)
    causal = jnp.tril(jnp.ones((MASK.shape[1],) * 2, jnp.bool_))
    logits, _ = model(
        TOKENS,
        positions=counts - (counts >= 1),
        attention_mask=MASK[:, None, :] * causal[None],
        cache=None,
    )
    chosen = jax.nn.log_softmax(logits[:, -KEPT - 1 : -1])
    return jnp.take_along_axis(chosen, TOKENS[:, -KEPT:, None], axis=-1)[..., 0]


@pytest.mark.slow
def test_the_tunix_module(base, wrapper):
    policy = wrapper(add_adapters(base, rank=2, rngs=nnx.Rngs(0)))
    found = nnx.jit(log_probs)(policy)
    for row, part in ((0, slice(2, 7)), (1, slice(None))):
        alone = jax.nn.log_softmax(forward(base, TOKENS[row : row + 1, part])[0][0])
        expected = alone[jnp.arange(len(alone) - 1), TOKENS[row, part][1:]]
        count = int(MASK[row, -KEPT:].sum())
        assert_close(found[row, :count], expected[-count:], "logits")

    optimizer = nnx.Optimizer(policy, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(policy, optimizer):
        def loss_of(policy):
            return -jnp.sum(log_probs(policy) * MASK[:, -KEPT:])

        of_adapters = nnx.DiffState(0, nnx.LoRAParam)
        loss, gradient = nnx.value_and_grad(loss_of, argnums=of_adapters)(policy)
        optimizer.update(policy, gradient)
        return loss

    losses = [float(step(policy, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0]
    tuned = policy.tuned()
    for mine, given in zip(
        jax.tree.leaves(remove_adapters(tuned)), jax.tree.leaves(base), strict=True
    ):
        np.testing.assert_array_equal(mine, given)
