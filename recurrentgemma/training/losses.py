"""Next-token cross-entropy, without ever holding all logits.

The loss of B x T tokens over V pieces needs [B, T, V] logits, which are far larger than
everything else a small model holds. They are computed for a block of tokens at a time;
while a block is there, so is everything that its gradient needs, and the forward pass
makes both (three matrix products of that size, where recomputing takes four):

    l = cap(hidden E^T)          Z = logsumexp(l)
    objective = sum mask (Z - l[target] + z_weight Z^2)
    dl = mask ((1 + 2 z_weight Z) softmax(l) - onehot(target)) cap'(l)
    d hidden = dl E              d E = dl^T hidden

The term of Z^2, the z-loss, keeps the normaliser near 1 (PaLM, arXiv 2204.02311,
section 5).
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange

from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels.precision import custom_vjp
from recurrentgemma.layers import soft_cap
from recurrentgemma.matrices import einsum
from recurrentgemma.training.vocabulary import Parts, parts_of

BLOCK_TOKENS = 1024
"""Most tokens of a block: enough for full-speed matrix products."""
BLOCK_LOGITS = 2**25
"""Logits, 128 MB, of which a block may have more only if it is a small part of all."""
BLOCKS = 64
"""Number of blocks that makes one a small part of all."""
LARGE_EMBEDDING = 2**26
"""Parameters of an embedding from which on its gradient, 256 MB, exists only once, and
is added to in parts of that size."""


class Losses(NamedTuple):
    """What the tokens of a batch cost."""

    objective: jax.Array
    """float32 scalar, the sum to be minimised: nats of counted tokens and their z-loss.
    Differentiable once, in the model and `hidden`."""
    nats: jax.Array
    """float32 [B, T], -log p of each target, counted or not; without gradient."""


def token_losses(
    model: Griffin,
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_weight: float = 0.0,
    block_tokens: int | None = None,
) -> Losses:
    """-log softmax(model.logits(hidden))[target] of each token, and their sum.

    Args:
      model: its embedding and soft cap are used.
      hidden: [B, T, D] from a call of the model.
      targets: int32 [B, T], the token after each one.
      mask: float32 [B, T], 1 where the target counts, 0 where it does not.
      z_weight: weight of the z-loss.
      block_tokens: tokens whose logits are held at once; None is `BLOCK_TOKENS`, or
          less if the logits are then below a tenth of all.
    """
    chex.assert_equal_shape([targets, mask])
    chex.assert_equal_shape_prefix([hidden, targets], 2)
    embedding = model.embedder.embedding[...]
    settings = Settings(
        model.config.logits_soft_cap,
        z_weight,
        block_tokens,
        parts_of(embedding, hidden),
    )
    with jax.default_matmul_precision(model.runtime.matmul_precision):
        objective, nats = _sums(settings, embedding, hidden, targets, mask)
    return Losses(objective, jax.lax.stop_gradient(nats))


def cross_entropy(
    model: Griffin,
    hidden: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    block_tokens: int | None = None,
) -> jax.Array:
    """Sum over counted tokens of -log softmax(model.logits(hidden))[target].

    Args:
      model, hidden, targets, mask, block_tokens: as for `token_losses`.

    Returns:
      float32 scalar, in nats; divide by `mask.sum()` for the mean.
    """
    losses = token_losses(model, hidden, targets, mask, block_tokens=block_tokens)
    return losses.objective


class Settings(NamedTuple):
    """What is no array."""

    cap: float | None
    z_weight: float
    block_tokens: int | None
    parts: Parts


def _run(settings, *arrays):
    def on_part(embedding, *arrays):
        def add_block(total, xs):
            objective, nats, *_ = _block(settings, embedding, *xs)
            return total + objective, nats

        blocks = _split(settings, embedding, *arrays)
        total, nats = jax.lax.scan(add_block, jnp.zeros((), jnp.float32), blocks)
        return _whole(settings, total, nats, arrays[1])

    return settings.parts.run(on_part, "st", *arrays)


def _forward(settings, *arrays):
    part = partial(_forward_part, settings)
    total, nats, *gradients = settings.parts.run(part, "stet", *arrays)
    return (total, nats), gradients


def _forward_part(settings, embedding, *arrays):
    cap, z_weight, _, parts = settings
    in_place = embedding.size > LARGE_EMBEDDING
    add_product = _add_in_place if in_place else _add_transposed

    def add_block(carry, xs):
        total, d_embedding = carry
        objective, nats, gathered, logits, log_normaliser = _block(
            settings, embedding, *xs
        )
        hidden, targets, mask = gathered
        pieces = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None]
        pieces += parts.first_piece(logits.shape[-1])
        d_logits = jnp.exp(logits - log_normaliser[..., None])
        if z_weight:
            d_logits = d_logits * (1 + 2 * z_weight * log_normaliser[..., None])
        d_logits = d_logits - (pieces == targets[..., None])
        if cap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / cap))
        d_logits = (d_logits * mask[..., None]).astype(hidden.dtype)
        d_hidden = parts.add_pieces(einsum("btv,vd->btd", d_logits, embedding))
        d_embedding = add_product(d_embedding, d_logits, hidden)
        return (total + objective, d_embedding), (d_hidden.astype(hidden.dtype), nats)

    shape = embedding.shape if in_place else embedding.shape[::-1]
    start = jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32)
    (total, d_embedding), (d_hidden, nats) = jax.lax.scan(
        add_block, start, _split(settings, embedding, *arrays)
    )
    d_embedding = parts.add_tokens(d_embedding if in_place else d_embedding.T)
    gradients = d_embedding.astype(embedding.dtype), _join(d_hidden, arrays[1])
    return *_whole(settings, total, nats, arrays[1]), *gradients


def _add_transposed(d_embedding, d_logits, hidden):
    """[D, V]: the other way round, XLA for CPU first transposes all of d_logits."""
    return d_embedding + einsum("btd,btv->dv", hidden, d_logits)


def _add_in_place(d_embedding, d_logits, hidden):
    """[V, D], in parts: neither the sum nor what is added to it is there twice."""
    vocab_size, _ = d_embedding.shape
    parts = -(-d_embedding.size // LARGE_EMBEDDING)
    rows = -(-vocab_size // parts)

    def add_part(part, d_embedding):
        # The last part begins early enough to be whole; what it repeats is 0.
        start = jnp.minimum(part * rows, vocab_size - rows)
        d_part = jax.lax.dynamic_slice_in_dim(d_logits, start, rows, axis=2)
        repeated = start + jnp.arange(rows) < part * rows
        d_part = jnp.where(repeated[None, None], 0, d_part)
        product = einsum("btv,btd->vd", d_part, hidden)
        held = jax.lax.dynamic_slice_in_dim(d_embedding, start, rows)
        held = held + product
        return jax.lax.dynamic_update_slice_in_dim(d_embedding, held, start, 0)

    return jax.lax.fori_loop(0, parts, add_part, d_embedding)


def _backward(settings, gradients, cotangents):
    cotangent, _ = cotangents
    d_embedding, d_hidden = (x * cotangent.astype(x.dtype) for x in gradients)
    return d_embedding, d_hidden, None, None


_sums = custom_vjp(_run, _forward, _backward, static=(0,))


def _block(settings, embedding, *block):
    """A block's objective and nats [B, t]; hidden, targets and mask of the devices that
    have other pieces; their logits [B, t, V] and logsumexp [B, t]."""
    cap, z_weight, _, parts = settings
    hidden, targets, mask = gathered = tuple(map(parts.gather, block))
    logits = soft_cap(einsum("btd,vd->btv", hidden, embedding), cap)
    log_normaliser = parts.logsumexp(logits)
    nats = log_normaliser - parts.take(logits, targets)
    objective = jnp.sum(nats * mask)
    if z_weight:
        objective = objective + z_weight * jnp.sum(jnp.square(log_normaliser) * mask)
    return objective, parts.own_rows(nats, 0), gathered, logits, log_normaliser


def _whole(settings, objective, nats, targets):
    """The objective of all devices, and the nats of this one's tokens [B, T]."""
    return settings.parts.add_tokens(objective), _join(nats, targets)


def _split(settings, embedding, *arrays):
    """Each [B, T, ...] -> [T / block, B, block, ...], padded with zeros."""
    batch_size, length = arrays[1].shape
    batch_size *= settings.parts.num_gathered
    block_tokens = settings.block_tokens
    if block_tokens is None:
        small = max(BLOCK_LOGITS // len(embedding), batch_size * length // BLOCKS)
        block_tokens = min(BLOCK_TOKENS * settings.parts.num_pieces, small)
    block = min(length, max(1, block_tokens // batch_size))

    def split(x):
        widths = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
        return rearrange(jnp.pad(x, widths), "b (n t) ... -> n b t ...", t=block)

    return tuple(map(split, arrays))


def _join(blocks, targets):
    """[T / block, B, block, ...] -> [B, T, ...], for targets [B, T]."""
    joined = rearrange(blocks, "n b t ... -> b (n t) ...")
    return joined[:, : targets.shape[1]]
