"""Leaf layers: the maths as pure functions, and modules that hold their parameters.

Layout is [B, T, channels]. Matrix products run in the dtype of the activations with
float32 accumulation; norms and the RG-LRU compute in float32. Equations: Griffin, arXiv
2402.19427, section 2.4 and appendix A.
"""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma._compat import value_of
from recurrentgemma.chunk import Chunk
from recurrentgemma.config import Runtime
from recurrentgemma.kernels import linear_scan, meshes, rg_lru, sharded
from recurrentgemma.kernels.complex_rg_lru import complex_rg_lru
from recurrentgemma.kernels.rg_lru.gates import Gate, logits
from recurrentgemma.kernels.rg_lru.reference import (
    DECAY_SCALE,
    input_factor,
    log_decay,
    scan_decay,
)
from recurrentgemma.matrices import (
    einsum,
    is_matrix,
    multiply,
    multiply_by_rows,
    take_rows,
)
from recurrentgemma.observed import effective_attention, replaced_states

NORM_EPSILON = 1e-6
RG_LRU_MIN_RADIUS, RG_LRU_MAX_RADIUS = 0.9, 0.999
"""Range of the decay at initialisation and an open recurrence gate."""
CG_LRU_MAX_PHASE = 0.1 * math.pi
"""Phases of complex decays are uniform up to here at initialisation."""
CONV_INIT_VARIANCE = 0.01


def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - bias.ndim))


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / rms(x) * (1 + scale) over the last axis, computed in float32.

    Args:
      x: [..., D].
      scale: [D].

    Returns:
      [..., D] in x's dtype.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + NORM_EPSILON)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    return (y * (1 + scale)).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), or x if cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def causal_conv1d(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, chunk: Chunk, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Depthwise causal convolution that does not reach across documents.

    Args:
      x: [B, T, E].
      kernel: [taps, E]; the last row multiplies the current token.
      bias: [E].
      chunk: positions of the tokens.
      state: [B, S, E], the last S inputs before the chunk, oldest first; S is at least
        taps - 1.

    Returns:
      y [B, T, E] and the state after the chunk [B, S, E], both in x's dtype.
    """
    tokens = (chunk.positions, chunk.lengths, chunk.next_position)
    return meshes.run_along_time(
        "btc,ic,c,bt,b,b,bsc->btc,bsc",
        _convolve,
        _convolve_shard,
        *(x, kernel, bias, *tokens, state),
        least_tokens=state.shape[1],
    )


def _convolve_shard(axis, x, kernel, bias, positions, lengths, next_position, state):
    length = x.shape[1]
    lengths = jnp.clip(lengths - jax.lax.axis_index(axis) * length, 0, length)
    state = sharded.halo(x, state, axis)
    y, state = _convolve(x, kernel, bias, positions, lengths, next_position, state)
    return y, sharded.of_last_token(state, positions, axis)


def _convolve(x, kernel, bias, positions, lengths, next_position, state):
    reach = kernel.shape[0] - 1
    length, kept = x.shape[1], state.shape[1]
    state = state.astype(x.dtype)
    inputs = jnp.concatenate([state, x], axis=1)
    kernel = kernel.astype(jnp.float32)[:, None, None, :]
    y = _add_bias(x.astype(jnp.float32) * kernel[reach], bias)
    for back in range(1, reach + 1):
        tap = inputs[:, kept - back : kept - back + length].astype(jnp.float32)
        same_document = (positions >= back)[..., None]
        y = y + jnp.where(same_document, tap * kernel[reach - back], 0)

    # Taken from x and from the state apart: a gather from `inputs` would have it stored.
    steps = jnp.arange(kept, dtype=jnp.int32)[None]
    index = lengths[:, None] + steps - kept
    position = (next_position[:, None] - kept + steps)[..., None]
    from_x = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1)
    from_state = jnp.take_along_axis(
        state, jnp.minimum(index + kept, kept - 1)[..., None], axis=1
    )
    new_state = jnp.where((index >= 0)[..., None], from_x, from_state)
    new_state = jnp.where(position >= 0, new_state, 0)
    return y.astype(x.dtype), new_state


class RMSNorm(nnx.Module):
    """`rms_norm` with its scale, initialised to zero."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.zeros([width]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in x's dtype."""
        return rms_norm(x, self.scale[...])


class Linear(nnx.Module):
    """x @ kernel + bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        init_variance: float = 1.0,
        rngs: nnx.Rngs,
    ):
        """Kernel normal with variance init_variance / in_features, bias zero."""
        init = jax.nn.initializers.variance_scaling(init_variance, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros([out_features])) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, in] -> [B, T, out] in x's dtype."""
        return self._with_bias(multiply(x, value_of(self.kernel)), x.dtype)

    def to_heads(self, x: jax.Array, head_dim: int) -> jax.Array:
        """[B, T, in] -> [B, T, heads, head_dim] in x's dtype: the outputs by head.

        As a product with an axis for heads, XLA for TPU writes the result head by head,
        as a kernel of attention reads it. It would copy a reshaped result twice. XLA for
        CPU would transpose the matrix of such a product.
        """

        def reshaped(x, kernel):
            y = multiply(x, kernel)
            return y.reshape(*y.shape[:2], -1, head_dim)

        def by_head(x, kernel):
            kernel = kernel.reshape(x.shape[2], -1, head_dim)
            return einsum("bti,inh->btnh", x, kernel)

        return self._with_bias(self._by_platform(x, by_head, reshaped), x.dtype)

    def from_heads(self, x: jax.Array) -> jax.Array:
        """[B, T, heads, head_dim] -> [B, T, out] in x's dtype; see `to_heads`."""

        def reshaped(x, kernel):
            return multiply(x.reshape(*x.shape[:2], -1), kernel)

        def by_head(x, kernel):
            return einsum("btnh,nho->bto", x, kernel.reshape(*x.shape[2:], -1))

        return self._with_bias(self._by_platform(x, by_head, reshaped), x.dtype)

    def _by_platform(self, x, on_tpu, elsewhere):
        kernel = value_of(self.kernel)
        if is_matrix(kernel):
            return elsewhere(x, kernel)
        return jax.lax.platform_dependent(x, kernel, tpu=on_tpu, default=elsewhere)

    def _with_bias(self, y, dtype):
        if self.bias is not None:
            y = _add_bias(y, self.bias[...].reshape(y.shape[2:]))
        return y.astype(dtype)


class BlockDiagonalLinear(nnx.Module):
    """A linear layer whose matrix is block-diagonal: G blocks of E / G channels."""

    def __init__(
        self,
        width: int,
        num_blocks: int,
        *,
        out_width: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Kernel LeCun-normal, bias zero; out_width None is width."""
        block = width // num_blocks
        out_block = (out_width or width) // num_blocks
        init = jax.nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=(0,)
        )
        self.kernel = nnx.Param(init(rngs.params(), (num_blocks, block, out_block)))
        self.bias = nnx.Param(jnp.zeros([num_blocks, out_block]))

    @property
    def gate(self) -> Gate:
        """The parameters, as the kernels take them."""
        return Gate(self.kernel[...], self.bias[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, width] -> [B, T, out_width] in x's dtype."""
        return logits(x, self.gate)


class CausalConv1D(nnx.Module):
    """`causal_conv1d` with its parameters."""

    def __init__(self, width: int, taps: int, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal((CONV_INIT_VARIANCE / taps) ** 0.5)
        self.kernel = nnx.Param(init(rngs.params(), (taps, width)))
        self.bias = nnx.Param(jnp.zeros([width]))

    def __call__(
        self, x: jax.Array, chunk: Chunk, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """[B, T, E], state [B, S, E] -> the same shapes."""
        return causal_conv1d(x, self.kernel[...], self.bias[...], chunk, state)


class RGLRU(nnx.Module):
    """The real-gated linear recurrent unit (Griffin, section 2.4).

    Observed, float32 [B, T, E]: the gates after their sigmoids, `decay` (a_t, before a
    document's start sets it to 0) and `state` (h_t); and `effective_attention`, float32
    [B, T, E, T], which cannot be replaced. The op forms none of them, so they are
    computed from its inputs, where somebody looks.
    """

    replaceable: ClassVar = ("recurrence_gate", "input_gate", "decay", "state")
    observed: ClassVar = (*replaceable[:3], "effective_attention", "state")

    def __init__(
        self, width: int, num_gate_blocks: int, runtime: Runtime, *, rngs: nnx.Rngs
    ):
        self.recurrence_gate = BlockDiagonalLinear(width, num_gate_blocks, rngs=rngs)
        self.input_gate = BlockDiagonalLinear(width, num_gate_blocks, rngs=rngs)
        self.a_param = nnx.Param(_init_a_param(rngs.params(), width))
        self.runtime = runtime

    def __call__(
        self, x: jax.Array, chunk: Chunk, h0: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, T, E], h0 float32 [B, E] -> y [B, T, E], h_last float32 [B, E]."""
        if chunk.sees(*self.observed):
            h = self._observed_states(x, chunk, h0)
            if chunk.replaces(*self.replaceable):
                return h.astype(x.dtype), h[:, -1]
        return rg_lru(
            x,
            self.recurrence_gate.gate,
            self.input_gate.gate,
            self.a_param[...],
            chunk.positions,
            h0,
            implementation=self.runtime.rg_lru,
            linear_scan=self.runtime.linear_scan,
        )

    def states(self, x: jax.Array, chunk: Chunk, h0: jax.Array) -> jax.Array:
        """float32 [B, T, E]: the state after every token, y before it is rounded."""
        if chunk.sees(*self.observed):
            h = self._observed_states(x, chunk, h0)
            if chunk.replaces(*self.replaceable):
                return h
        return rg_lru(
            x.astype(jnp.float32),
            self.recurrence_gate(x),
            self.input_gate(x),
            self.a_param[...],
            chunk.positions,
            h0,
            implementation=self.runtime.rg_lru,
            linear_scan=self.runtime.linear_scan,
        )[0]

    def _observed_states(self, x, chunk, h0):
        """The states, from values that the observer sees and may have replaced."""
        recurrence_gate, input_gate = (
            chunk.observe(name, jax.nn.sigmoid(gate(x).astype(jnp.float32)))
            for name, gate in (
                ("recurrence_gate", self.recurrence_gate),
                ("input_gate", self.input_gate),
            )
        )
        log_a = log_decay(self.a_param[...])[None, None] * recurrence_gate
        decay = chunk.observe("decay", jnp.exp(log_a))
        if chunk.replaces("decay"):
            radicand = 1 - decay * decay
        else:
            radicand = -jnp.expm1(2 * log_a)
        scanned = input_gate * x.astype(jnp.float32)
        position = chunk.positions[..., None]
        scale = jnp.where(position < 0, 0.0, input_factor(radicand, position))
        decay = scan_decay(decay, position)
        if chunk.sees("effective_attention"):
            operator = effective_attention(scale * input_gate, decay)
            chunk.show("effective_attention", operator, over_tokens=True)
        inputs = scale * scanned, decay
        if chunk.replaces("state"):
            h = replaced_states(inputs, h0, chunk)
        else:
            h, _ = linear_scan(*inputs, h0, implementation=self.runtime.linear_scan)
        chunk.show("state", h)
        return h


class ComplexRGLRU(RGLRU):
    """The complex one, CG-LRU (Griffin, appendix B): E / 2 real parts come first.

    Observed, float32: the gates after their sigmoids [B, T, E / 2], and `state`.
    """

    replaceable: ClassVar = ("recurrence_gate", "input_gate", "state")
    observed: ClassVar = replaceable

    def __init__(
        self, width: int, num_gate_blocks: int, runtime: Runtime, *, rngs: nnx.Rngs
    ):
        half = width // 2
        self.recurrence_gate = BlockDiagonalLinear(
            width, num_gate_blocks, out_width=half, rngs=rngs
        )
        self.input_gate = BlockDiagonalLinear(
            width, num_gate_blocks, out_width=half, rngs=rngs
        )
        self.a_param = nnx.Param(_init_a_param(rngs.params(), half))
        self.a_imag_param = nnx.Param(
            jax.random.uniform(rngs.params(), (half,), maxval=CG_LRU_MAX_PHASE)
        )
        self.runtime = runtime

    def __call__(
        self, x: jax.Array, chunk: Chunk, h0: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, T, E], h0 float32 [B, E] -> y [B, T, E], h_last float32 [B, E]."""
        if chunk.sees("state"):
            h = self.states(x, chunk, h0)
            if chunk.replaces("state"):
                return h.astype(x.dtype), h[:, -1]
        return self._scan(x, self._gates(x, chunk), chunk.positions, h0)

    def states(self, x: jax.Array, chunk: Chunk, h0: jax.Array) -> jax.Array:
        """float32 [B, T, E]: the state after every token, y before it is rounded."""
        inputs = x.astype(jnp.float32), self._gates(x, chunk), chunk.positions
        if chunk.replaces("state"):

            def advance(h, token):
                x, gate_logits, positions = token
                return self._scan(x, gate_logits, positions, h)[1]

            h = replaced_states(inputs, h0, chunk, advance)
        else:
            h, _ = self._scan(*inputs, h0)
        chunk.show("state", h)
        return h

    def _scan(self, x, gate_logits, positions, h0):
        recurrence_logits, input_logits = gate_logits
        return complex_rg_lru(
            x,
            recurrence_logits,
            input_logits,
            self.a_param[...],
            self.a_imag_param[...],
            positions,
            h0,
            implementation=self.runtime.linear_scan,
        )

    def _gates(self, x, chunk):
        return (
            self._gate_logits("recurrence_gate", x, chunk),
            self._gate_logits("input_gate", x, chunk),
        )

    def _gate_logits(self, name, x, chunk):
        """The logits of a gate; those of its replacement, where it has one."""
        given = getattr(self, name)(x)
        if not chunk.sees(name):
            return given
        gate = chunk.observe(name, jax.nn.sigmoid(given.astype(jnp.float32)))
        return jax.scipy.special.logit(gate) if chunk.replaces(name) else given


def _init_a_param(key: jax.Array, width: int) -> jax.Array:
    """Decays for r = 1 that are uniform in area on the ring between the two radii."""
    low, high = RG_LRU_MIN_RADIUS**2, RG_LRU_MAX_RADIUS**2
    area = jax.random.uniform(key, (width,), minval=low, maxval=high)
    log_a = 0.5 * jnp.log(area)
    return jnp.log(jnp.expm1(-log_a / DECAY_SCALE))


class Embedder(nnx.Module):
    """Token embedding, tied with the output projection."""

    def __init__(self, vocab_size: int, width: int, scale: float, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=1, out_axis=0
        )
        self.embedding = nnx.Param(init(rngs.params(), (vocab_size, width)))
        self.scale = scale

    def encode(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """int32 [B, T] -> scaled embeddings [B, T, D] in dtype."""
        x = take_rows(value_of(self.embedding), tokens, dtype)
        return x * jnp.asarray(self.scale, dtype)

    def decode(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> logits before the soft cap, float32 [B, T, V]."""
        return multiply_by_rows(x, value_of(self.embedding))
