"""The recurrent block (Griffin, section 2.3 and figure 2c).

y = W_out (gelu(W_y x + b_y) * RGLRU(conv1d(W_x x + b_x))) + b_out
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma._validation import refuse
from recurrentgemma.blocks import history
from recurrentgemma.blocks.mixer import Mixer
from recurrentgemma.chunk import Chunk
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.kernels.recurrent_step import StepParameters, recurrent_step
from recurrentgemma.layers import RGLRU, CausalConv1D, ComplexRGLRU, Linear

_FLOPS_PER_CHANNEL = {"real": 2, "complex": 4}
"""Multiplies and adds of h = a h + x, a channel."""


class RecurrentState(NamedTuple):
    """The state of a recurrent block, of which the last K tokens may be taken back."""

    h: jax.Array
    """RG-LRU state, float32 [B, E]. Where tokens may be taken back: the states after
    each of the last 1 + K tokens, the newest last; float32 [B, 1 + K, E]."""
    conv: jax.Array
    """Last inputs of the convolution, oldest first, zeros before the document's start;
    compute dtype [B, conv_width - 1 + K, E]."""

    @property
    def is_rewindable(self) -> bool:
        """Whether h has the states of several tokens."""
        return self.h.ndim > 2


class RecurrentBlock(Mixer):
    """A convolution and an RG-LRU beside a gelu branch."""

    float32_parameters: ClassVar[tuple[str, ...]] = ("conv_1d",)
    undecayed_parameters: ClassVar[tuple[str, ...]] = ("conv_1d", "rg_lru")

    def __init__(self, config: GriffinConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        width, lru_width = config.width, config.lru_width
        self.linear_x = Linear(width, lru_width, rngs=rngs)
        self.linear_y = Linear(width, lru_width, rngs=rngs)
        self.conv_1d = CausalConv1D(lru_width, config.conv_width, rngs=rngs)
        unit = ComplexRGLRU if config.complex_rg_lru else RGLRU
        self.rg_lru = unit(lru_width, config.num_gate_blocks, runtime, rngs=rngs)
        self.linear_out = Linear(
            lru_width, width, init_variance=2 / config.num_layers, rngs=rngs
        )
        self.config = config
        self.runtime = runtime

    def __call__(
        self, x: jax.Array, chunk: Chunk, state: RecurrentState | None
    ) -> tuple[jax.Array, RecurrentState]:
        """x [B, T, D] -> y [B, T, D] in x's dtype, and the state after the chunk.

        Observed: `gate` (the gelu branch), `conv` and `recurrence`, [B, T, E] in x's
        dtype, and what `rg_lru` shows.
        """
        if state is None:
            state = self.init_state(x.shape[0])
        with jax.named_scope("recurrent_block"):
            gate = jax.nn.gelu(self.linear_y(x), approximate=True)
            gate = chunk.observe("gate", gate)
            u = self.linear_x(x)
            mix = self._step if self._fuses(u, chunk, state) else self._read
            y, state = mix(u, chunk, state)
            y = chunk.observe("recurrence", y)
            return self.linear_out(y * gate), state

    @classmethod
    def check_config(cls, config: GriffinConfig) -> None:
        """See `Mixer.check_config`."""
        parts = 2 if config.complex_rg_lru else 1
        if config.lru_width % (parts * config.num_gate_blocks):
            times = "twice " if config.complex_rg_lru else ""
            refuse(
                "lru_width",
                f"a multiple of {times}num_gate_blocks ({config.num_gate_blocks})",
                config.lru_width,
            )

    def _fuses(self, u, chunk, state) -> bool:
        """Whether the decode step op may do the work of `conv_1d` and `rg_lru`.

        It computes what these classes compute. So it may not where a module of another
        class is in their place, or where somebody looks at what lies between them.
        """
        return (
            u.shape[1] == 1
            and not state.is_rewindable
            and type(self.conv_1d) is CausalConv1D
            and type(self.rg_lru) is RGLRU
            and not chunk.sees("conv", *RGLRU.observed)
        )

    def _read(self, u, chunk, state):
        """Convolution and RG-LRU of a chunk of any length."""
        u, conv = self.conv_1d(u, chunk, state.conv)
        u = chunk.observe("conv", u)
        with jax.named_scope("rg_lru"):
            if not state.is_rewindable:
                y, h = self.rg_lru(u, chunk, state.h)
                return y, RecurrentState(h, conv)
            h = self.rg_lru.states(u, chunk, state.h[:, -1])
            kept = history.extend(state.h, h, chunk.lengths)
            return h.astype(u.dtype), RecurrentState(kept, conv)

    def _step(self, u, chunk, state):
        """The same for one token a row, as one op."""
        parameters = StepParameters(
            self.conv_1d.kernel[...],
            self.conv_1d.bias[...],
            self.rg_lru.recurrence_gate.gate,
            self.rg_lru.input_gate.gate,
            self.rg_lru.a_param[...],
        )
        with jax.named_scope("recurrent_step"):
            y, h, conv = recurrent_step(
                u[:, 0],
                parameters,
                chunk.positions[:, 0],
                state.h,
                state.conv,
                implementation=self.runtime.recurrent_step,
            )
        return y[:, None], RecurrentState(h, conv)

    def init_state(
        self, batch_size: int, capacity: int | None = None
    ) -> RecurrentState:
        """The state before any token; capacity is not used."""
        config = self.config
        conv_shape = (batch_size, config.conv_width - 1, config.lru_width)
        return RecurrentState(
            h=jnp.zeros((batch_size, config.lru_width), jnp.float32),
            conv=jnp.zeros(conv_shape, self.runtime.dtype),
        )

    @classmethod
    def other_flops(cls, config: GriffinConfig, length: int) -> float:
        """2 for each tap of the convolution, and the recurrence, for each channel."""
        numbers = "complex" if config.complex_rg_lru else "real"
        return config.lru_width * (2 * config.conv_width + _FLOPS_PER_CHANNEL[numbers])

    @classmethod
    def make_rewindable(
        cls,
        config: GriffinConfig,
        state: RecurrentState,
        count: int,
        capacity: int | None,
    ) -> RecurrentState:
        """Keeps the states of 1 + count tokens and as many more inputs."""
        h = state.h if state.is_rewindable else state.h[:, None]
        conv = history.keep_newest(state.conv, config.conv_width - 1 + count)
        if count == 0:
            return RecurrentState(h[:, -1], conv)
        return RecurrentState(history.keep_newest(h, 1 + count), conv)

    @classmethod
    def rewind(
        cls,
        config: GriffinConfig,
        state: RecurrentState,
        counts: jax.Array,
        next_position: jax.Array,
    ) -> RecurrentState:
        """See `Mixer.rewind`."""
        del config, next_position
        return RecurrentState(*(history.step_back(part, counts) for part in state))
