"""Next-token cross-entropy, without ever holding all logits.

The loss of B x T tokens over V pieces needs [B, T, V] logits, which are far larger than
everything else a small model holds. They are computed for a block of tokens at a time;
while a block is there, so is everything that its gradient needs, and the forward pass
makes both (three matrix products of that size, where recomputing takes four):

    l = cap(hidden E^T)          nats = sum mask (logsumexp(l) - l[target])
    dl = mask (softmax(l) - onehot(target)) cap'(l)
    d hidden = dl E              d E = dl^T hidden
"""

import chex
import jax
import jax.numpy as jnp
from einops import rearrange

from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels.precision import custom_vjp
from recurrentgemma.layers import soft_cap
from recurrentgemma.matrices import einsum

# Logits held at once, counted in tokens. Large enough for full-speed matrix products.
BLOCK_TOKENS = 1024


def cross_entropy(
    model: Griffin,
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    block_tokens: int = BLOCK_TOKENS,
) -> jax.Array:
    """Sum over counted tokens of -log softmax(model.logits(hidden))[target].

    Differentiable once, in the model and `hidden`.

    Args:
        model: its embedding and soft cap are used.
        hidden: [B, T, D] from a call of the model.
        targets: int32 [B, T], the token after each one.
        mask: float32 [B, T], 1 where the target counts, 0 where it does not.
        block_tokens: logits held at once, in tokens.

    Returns:
        float32 scalar, in nats; divide by `mask.sum()` for the mean.
    """
    chex.assert_equal_shape([targets, mask])
    chex.assert_equal_shape_prefix([hidden, targets], 2)
    batch_size, length = targets.shape
    block = min(length, max(1, block_tokens // batch_size))
    blocks = tuple(_split(x, block) for x in (hidden, targets, mask))
    cap = model.config.logits_soft_cap
    with jax.default_matmul_precision(model.runtime.matmul_precision):
        return _sum_of_nats(cap, model.embedder.embedding[...], *blocks)


def _run(cap, embedding, hidden, targets, mask):
    def add_block(total, xs):
        _, nats, _ = _block(cap, embedding, *xs)
        return total + nats, None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add_block, zero, (hidden, targets, mask))[0]


def _forward(cap, embedding, hidden, targets, mask):
    def add_block(carry, xs):
        total, d_embedding = carry
        hidden, targets, mask = xs
        logits, nats, log_normaliser = _block(cap, embedding, *xs)
        pieces = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None]
        d_logits = jnp.exp(logits - log_normaliser[..., None])
        d_logits = d_logits - (pieces == targets[..., None])
        if cap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / cap))
        d_logits = (d_logits * mask[..., None]).astype(hidden.dtype)
        d_hidden = einsum("btv,vd->btd", d_logits, embedding).astype(hidden.dtype)
        # [D, V]: the other way round, XLA for CPU first transposes all of d_logits.
        d_embedding = d_embedding + einsum("btd,btv->dv", hidden, d_logits)
        return (total + nats, d_embedding), d_hidden

    start = jnp.zeros((), jnp.float32), jnp.zeros(embedding.shape[::-1], jnp.float32)
    (total, d_embedding), d_hidden = jax.lax.scan(
        add_block, start, (hidden, targets, mask)
    )
    return total, (d_embedding.T.astype(embedding.dtype), d_hidden)


def _backward(cap, gradients, cotangent):
    d_embedding, d_hidden = (x * cotangent.astype(x.dtype) for x in gradients)
    return d_embedding, d_hidden, None, None


_sum_of_nats = custom_vjp(_run, _forward, _backward, static=(0,))


def _block(cap, embedding, hidden, targets, mask):
    """Logits [B, t, V], their sum of nats, and logsumexp [B, t] of a block."""
    logits = soft_cap(einsum("btd,vd->btv", hidden, embedding), cap)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logits, jnp.sum((log_normaliser - chosen) * mask), log_normaliser


def _split(x: jax.Array, block: int) -> jax.Array:
    """[B, T, ...] -> [T / block, B, block, ...], padded with zeros."""
    widths = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
    return rearrange(jnp.pad(x, widths), "b (n t) ... -> n b t ...", t=block)
