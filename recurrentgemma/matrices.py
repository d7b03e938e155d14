"""Values of parameters that stand for a matrix: low-rank-adapted, or quantised.

    LowRank      W + scale A B          (LoRA, arXiv 2106.09685, section 4.1)
    Quantized    values * scales        (int8, a scale for each output channel)

A parameter of a model may hold one of these pytrees instead of an array. The functions
here multiply by either without forming the matrix: (x W) + scale (x A) B, and the
product with the int8 values times the scales. Everything else reads `parameter[...]`,
which forms it where it is used: inside the rematerialised and scanned group.

Leading axes, of stacked layers or of diagonal blocks, are those of the matrix.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.precision import einsum_float32

FEW_ROWS = 16
"""Up to here a product with the embedding is bound by reading the embedding."""
INT8_MAX = 127
"""Largest magnitude of a quantised value: the range is symmetric."""


class Matrix:
    """What a parameter may hold instead of an array; a pytree of arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        raise NotImplementedError(f"{type(self).__name__} has no shape")

    def materialize(self) -> jax.Array:
        """The matrix as an array."""
        raise NotImplementedError(f"{type(self).__name__} has no materialize")

    def __getitem__(self, key: Any) -> jax.Array:
        """An entry of the matrix; `[...]` is all of it."""
        return self.materialize()[key]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Matrix):
    """base + scale * lora_a @ lora_b over the last two axes."""

    base: Any
    """[..., in, out]: an array, or a `Quantized`."""
    lora_a: Any
    """[..., in, rank]."""
    lora_b: Any
    """[..., rank, out]."""
    scale: float = dataclasses.field(metadata={"static": True})
    """alpha / rank."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        return self.base.shape

    def materialize(self) -> jax.Array:
        """[..., in, out] in the base's dtype; the sum is formed in float32."""
        base = self.base[...]
        product = einsum_float32(
            "...ir,...ro->...io",
            self.lora_a.astype(jnp.float32),
            self.lora_b.astype(jnp.float32),
        )
        return (base.astype(jnp.float32) + self.scale * product).astype(base.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Matrix):
    """values * scales. The axis over which a product sums has one scale."""

    values: Any
    """int8 [..., in, out], in [-127, 127]."""
    scales: Any
    """float32 [..., 1, out]; of an embedding, [..., V, 1]: one for each token."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., in, out]."""
        return self.values.shape

    def materialize(self) -> jax.Array:
        """[..., in, out], float32."""
        return self.values.astype(self.scales.dtype) * self.scales


def is_matrix(value: Any) -> bool:
    """Whether a node of a model is a value of this module."""
    return isinstance(value, Matrix)


def einsum(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """A matrix product in x's dtype, accumulated in float32.

    Args:
      subscripts: as for `jnp.einsum`.
      x: activations, in the compute dtype.
      w: parameters, of any dtype.

    Returns:
      The product, float32. (Callers cast it where it leaves the layer.)
    """
    return einsum_float32(subscripts, x, w.astype(x.dtype))


def multiply(x: jax.Array, kernel: Any) -> jax.Array:
    """x @ kernel.

    Args:
      x: [B, T, in], in the compute dtype.
      kernel: [in, out], an array or a `Matrix`.

    Returns:
      float32 [B, T, out].
    """
    if isinstance(kernel, LowRank):
        inner = (kernel.scale * multiply(x, kernel.lora_a)).astype(x.dtype)
        return multiply(x, kernel.base) + multiply(inner, kernel.lora_b)
    if isinstance(kernel, Quantized):
        return multiply(x, kernel.values) * kernel.scales[None]
    return einsum("bti,io->bto", x, kernel)


def take_rows(embedding: Any, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding.

    Args:
      embedding: [V, D], an array or a `Matrix`.
      tokens: int32 [B, T].
      dtype: of the result.

    Returns:
      [B, T, D].
    """
    if isinstance(embedding, LowRank):
        rows = take_rows(embedding.base, tokens, jnp.dtype(jnp.float32))
        inner = embedding.scale * embedding.lora_a[tokens].astype(jnp.float32)
        return (rows + multiply(inner, embedding.lora_b)).astype(dtype)
    if isinstance(embedding, Quantized):
        rows = embedding.values[tokens].astype(jnp.float32)
        return (rows * embedding.scales[tokens]).astype(dtype)
    return embedding[tokens].astype(dtype)


def multiply_by_rows(x: jax.Array, embedding: Any) -> jax.Array:
    """x @ embedding.T: the product with every row.

    Args:
      x: [B, T, D], in the compute dtype.
      embedding: [V, D], an array or a `Matrix`.

    Returns:
      float32 [B, T, V].
    """
    if isinstance(embedding, LowRank):
        inner = embedding.scale * multiply_by_rows(x, embedding.lora_b)
        more = multiply_by_rows(inner.astype(x.dtype), embedding.lora_a)
        return multiply_by_rows(x, embedding.base) + more
    if isinstance(embedding, Quantized):
        products = multiply_by_rows(x, embedding.values)
        return products * embedding.scales[None, None, :, 0]
    if x.shape[0] * x.shape[1] > FEW_ROWS:
        return einsum("btd,vd->btv", x, embedding)
    return jax.lax.platform_dependent(
        x,
        embedding,
        cpu=_few_rows_times_embedding,
        default=partial(einsum, "btd,vd->btv"),
    )


def _few_rows_times_embedding(x: jax.Array, embedding: jax.Array) -> jax.Array:
    # XLA for CPU reads a matrix twice as fast as the left operand of few columns.
    batch_size, length, width = x.shape
    rows = x.reshape(batch_size * length, width)
    logits = einsum_float32("vd,nd->vn", embedding.astype(x.dtype), rows)
    logits = jax.lax.optimization_barrier(logits).T  # Or XLA swaps them back.
    return logits.reshape(batch_size, length, -1)
