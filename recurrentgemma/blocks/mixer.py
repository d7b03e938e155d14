"""What a temporal mixer is: the part of a residual block that moves information in time.

A mixer is a class derived from `Mixer` and a line in `TEMPORAL_MIXERS`:

    mixer = Mine(config, runtime, rngs=rngs)
    y, state = mixer(x, chunk, state)
    state = mixer.init_state(batch_size, capacity)

x and y are [B, T, D] in the compute dtype. The state is any pytree of arrays with the
batch axis first, whose shapes do not depend on T. At padding (position -1) the state
must not change and y must be finite; position 0 starts a document, which sees nothing
before it.

These three methods are all that a mixer must have. Everything else that depends on a
mixer (cost, cache, checkpoints, weight decay) asks its class, and has a default here.
Parameters and bytes of state are counted from shapes.
"""

from typing import Any, ClassVar, Self

import jax
from flax import nnx

from recurrentgemma.chunk import Chunk
from recurrentgemma.config import GriffinConfig, Runtime


class Mixer(nnx.Module):
    """The base class of temporal mixers."""

    part: ClassVar[str] = "recurrent blocks"
    """Part of the model under which its parameters are counted and shown."""
    uses_rotary: ClassVar[bool] = False
    """Whether it reads `Chunk.rotary`."""
    needs_capacity: ClassVar[bool] = False
    """Whether its state holds a bounded number of tokens, the capacity of the cache.
    Such a state has a property `capacity`, its number of slots, and a property
    `num_tokens`, int32 [B]: the tokens of its document that it holds, or
    `recurrentgemma.cache.OVERFLOWN` from the time when it loses one until the row's
    next document."""
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    """Names inside the mixer, such as "conv_1d", of what stays float32 at inference.
    Only parameters called `kernel` are in the compute dtype at all."""
    undecayed_parameters: ClassVar[tuple[str, ...]] = ()
    """Names inside the mixer of what weight decay leaves alone. Only parameters called
    `kernel` are decayed at all."""

    def __init__(self, config: GriffinConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        """Random float32 parameters."""
        raise NotImplementedError(f"{type(self).__name__} has no __init__")

    def __call__(self, x: jax.Array, chunk: Chunk, state: Any) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> y [B, T, D] in x's dtype, and the state after the chunk.

        Args:
          x: activations in the compute dtype.
          chunk: positions of the tokens.
          state: the state of the rows; None is that of rows that have read nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __call__")

    def init_state(self, batch_size: int, capacity: int | None = None) -> Any:
        """The state before any token; capacity is that of the cache, if it has one."""
        raise NotImplementedError(f"{type(self).__name__} has no init_state")

    @classmethod
    def check_config(cls, config: GriffinConfig) -> None:
        """Raises ValueError if fields that this mixer uses do not fit each other."""

    @classmethod
    def shapes(cls, config: GriffinConfig, dtype: str = "float32") -> Self:
        """The mixer with shapes for parameters; nothing is allocated."""
        runtime = Runtime(compute_dtype=dtype)
        return nnx.eval_shape(lambda: cls(config, runtime, rngs=nnx.Rngs(0)))

    @classmethod
    def is_multiplied(cls, name: str) -> bool:
        """Whether a parameter, by its name inside the mixer, is only multiplied: it is
        a matrix, in the compute dtype at inference."""
        return _is_kernel(name) and not _is_inside(name, cls.float32_parameters)

    @classmethod
    def is_decayed(cls, name: str) -> bool:
        """Whether weight decay applies to a parameter, by its name inside the mixer."""
        return _is_kernel(name) and not _is_inside(name, cls.undecayed_parameters)

    @classmethod
    def other_flops(cls, config: GriffinConfig, length: int) -> float:
        """FLOPs a token, averaged over `length` tokens, besides 2 for each parameter
        called `kernel` that is not among `float32_parameters`."""
        del config, length
        return 0.0

    @classmethod
    def grow(cls, config: GriffinConfig, state: Any, before: int, capacity: int) -> Any:
        """The state of a cache of another capacity; as it is where none is needed.

        Args:
          config: of the model.
          state: of a cache that has room for `before` tokens.
          before: capacity of the present cache.
          capacity: capacity of the new cache.
        """
        del config, before, capacity
        return state

    @classmethod
    def make_rewindable(
        cls, config: GriffinConfig, state: Any, count: int, capacity: int | None
    ) -> Any:
        """The state that also keeps what `rewind` needs for `count` tokens.

        Args:
          config: of the model.
          state: a state, rewindable or not.
          count: K, most tokens to take back.
          capacity: capacity of the cache; None if there is no bound.

        Raises:
          ValueError: tokens cannot be taken back from this mixer (the default).
        """
        del config, state, count, capacity
        raise ValueError(
            f"cache: expected layers that tokens can be taken back from, got "
            f"{cls.__name__}; give its class make_rewindable and rewind, or decode "
            "without a draft model"
        )

    @classmethod
    def rewind(
        cls,
        config: GriffinConfig,
        state: Any,
        counts: jax.Array,
        next_position: jax.Array,
    ) -> Any:
        """The state before the last tokens of each row.

        Args:
          config: of the model.
          state: from `make_rewindable`, or what a call made of it.
          counts: int32 [B], tokens to take back.
          next_position: int32 [B], position of each row's next token after that.
        """
        raise NotImplementedError(f"{cls.__name__} has no rewind")


def _is_kernel(name: str) -> bool:
    return name.split(".")[-1] == "kernel"


def _is_inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
