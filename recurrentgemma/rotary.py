"""Rotary position embedding (arXiv 2104.09864), exact at any int32 position.

Pair i of a head turns by f_i = wavelength ** (-i / pairs) radians a token. A float32
product `position * f_i` is off by whole radians at position 1e8, so the angle is kept
as a fixed-point fraction of a turn instead: f_i / 2 pi as a 64-bit fraction (two
uint32 words), multiplied by the position modulo one turn in uint32 arithmetic. What is
left of the error is the rounding of the final angle to float32, below 4e-7 radians.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

MAX_WAVELENGTH = 10_000.0
"""Base of the geometric series of frequencies."""

_HALF_WORD = 16
_HALF_MASK = np.uint32(0xFFFF)
_RADIANS = np.float32(2 * math.pi / 2**32)


def _turns_per_token(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """High and low uint32 words of f_i / 2 pi as 64-bit fractions of a turn."""
    frequency = MAX_WAVELENGTH ** (-np.arange(pairs, dtype=np.float64) / pairs)
    high, rest = np.divmod(frequency / (2 * math.pi) * 2.0**32, 1.0)
    return high.astype(np.uint32), np.floor(rest * 2.0**32).astype(np.uint32)


def rotary_tables(positions: jax.Array, rotated_dim: int) -> tuple[jax.Array, ...]:
    """Cosine and sine of the angle of each pair at each position.

    Args:
      positions: int32 [B, T]; any value from 0 on. Negative ones give finite values.
      rotated_dim: number of leading channels of a head that turn; even.

    Returns:
      (cos, sin), float32 [B, T, rotated_dim / 2].
    """
    high, low = _turns_per_token(rotated_dim // 2)
    position = positions.astype(jnp.uint32)[..., None]
    upper, lower = position >> _HALF_WORD, position & _HALF_MASK
    low_upper = (low >> _HALF_WORD)[None, None]
    low_lower = (low & _HALF_MASK)[None, None]
    # The high word of position * low, from 16-bit halves.
    carry = (
        upper * low_upper
        + ((lower * low_upper) >> _HALF_WORD)
        + ((upper * low_lower) >> _HALF_WORD)
    )
    turns = position * high[None, None] + carry
    angle = jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32)
    angle = angle * _RADIANS
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x: jax.Array, tables: tuple[jax.Array, ...]) -> jax.Array:
    """Turns the leading channels of each head.

    Channel i of the first half of the rotated part is paired with channel i of its
    second half.

    Args:
      x: [B, T, heads, H].
      tables: (cos, sin) of `rotary_tables`, float32 [B, T, rotated_dim / 2].

    Returns:
      [B, T, heads, H] in x's dtype, computed in float32.
    """
    cos, sin = (table[:, :, None] for table in tables)
    half = cos.shape[-1]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    turned = (first * cos - second * sin, second * cos + first * sin)
    rest = x[..., 2 * half :]
    return jnp.concatenate([part.astype(x.dtype) for part in turned] + [rest], axis=-1)
