"""Models with random weights and their compiled programs: what the sweeps measure.

Speed and size do not depend on what the weights are. A program is compiled before its
arguments exist, so that its time and the memory that it needs are known before it runs.
"""

import difflib
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import cache as cache_lib
from recurrentgemma import cost
from recurrentgemma.cache import Cache
from recurrentgemma.checkpoints.parameters import (
    describe,
    named_parameters,
    parameter_dtype,
)
from recurrentgemma.config import PRESETS, GriffinConfig, Runtime
from recurrentgemma.generation import programs
from recurrentgemma.generation.history import History
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.griffin import Griffin
from recurrentgemma.mixers import TEMPORAL_MIXERS

A_PARAM = (-6.0, 1.0)
"""Mean and spread of `a_param`: decays near 1, as in a new model."""
RANDOM_VALUES = 1_000_003
"""Number of random values before they come again: no multiple of any width."""
SYNTHETIC_SCALE = 0.1
NEVER = 2**30
"""A number of tokens that no row draws."""


def _three_families(
    sizes: Mapping[str, Any], suffix: str, *, mlp_widths: tuple[int, int, int]
) -> dict[str, GriffinConfig]:
    """Models in the shapes of RecurrentGemma, Gemma 1 and Gemma 2.

    Args:
      sizes: fields that they share.
      suffix: end of their names.
      mlp_widths: widths with which they have about as many parameters.
    """
    gemma: dict[str, Any] = {
        "rope_fraction": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
        "num_gate_blocks": 1,
        "embedding_scale": math.sqrt(sizes["width"]),
    }
    griffin = {
        "attention_window": 1024,
        # As the official code rounds it.
        "embedding_scale": float(jnp.bfloat16(math.sqrt(sizes["width"]))),
        "logits_soft_cap": 30.0,
    }
    gemma2 = {
        **gemma,
        "block_pattern": ("local_attention", "global_attention"),
        "num_kv_heads": sizes["num_heads"] // 2,
        "attention_window": 1023,
        "attention_soft_cap": 50.0,
        "logits_soft_cap": 30.0,
        "post_norms": True,
    }
    families = {
        "recurrentgemma": griffin,
        "gemma": {**gemma, "block_pattern": ("global_attention",)},
        "gemma2": gemma2,
    }
    return {
        f"{name}-{suffix}": GriffinConfig(**{**sizes, "mlp_width": width, **fields})
        for (name, fields), width in zip(families.items(), mlp_widths, strict=True)
    }


SMALL_PRESETS = _three_families(
    {
        "vocab_size": 32_000,
        "width": 768,
        "num_layers": 12,
        "num_heads": 6,
        "head_dim": 128,
        "lru_width": 768,
        "num_gate_blocks": 6,
    },
    "100m",
    mlp_widths=(2304, 2480, 2304),
)
"""Models in the shapes of RecurrentGemma, Gemma 1 and Gemma 2, of about 109.6 million
parameters each: small enough for a CPU."""
MINIATURES = _three_families(
    {
        "vocab_size": 8_000,
        "width": 256,
        "num_layers": 6,
        "num_heads": 4,
        "head_dim": 64,
        "lru_width": 256,
        "num_gate_blocks": 4,
    },
    "7m",
    mlp_widths=(768, 828, 788),
)
"""The same with about 6.85 million parameters, for a look within minutes."""
TINY_PRESETS = {
    "griffin-175k": GriffinConfig(
        vocab_size=256,
        width=64,
        num_layers=3,
        num_heads=2,
        head_dim=32,
        lru_width=64,
        num_gate_blocks=2,
        mlp_width=192,
        attention_window=128,
    ),
}
"""A Griffin with one round of its pattern: a CPU reads a million tokens in minutes."""


def find(name: str) -> GriffinConfig:
    """The config of `SMALL_PRESETS`, `MINIATURES`, `TINY_PRESETS` or of a preset.

    Raises:
      ValueError: there is none of this name.
    """
    known = {**SMALL_PRESETS, **MINIATURES, **TINY_PRESETS, **PRESETS}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or list(known)
        raise ValueError(
            f"--preset: expected a name such as {', '.join(close)}, got {name!r}"
        )
    return known[name]


def random_model(config: GriffinConfig, runtime: Runtime = Runtime()) -> Griffin:
    """A model with random weights in the dtypes of inference, as `load` would give."""
    described = describe(config, runtime)
    leaves = []
    for name, leaf in named_parameters(described).items():
        dtype = parameter_dtype(name, config, runtime)
        if name.endswith("a_param"):
            mean, scale = A_PARAM
        else:
            fan_in = leaf.shape[-1 if name.endswith("embedding") else -2 :][0]
            mean, scale = 0.0, fan_in**-0.5
        leaves.append(jnp.asarray(_random(leaf.shape, dtype, mean, scale)))
    return jax.tree.unflatten(jax.tree.structure(described), leaves)


def abstract_model(config: GriffinConfig, runtime: Runtime) -> Griffin:
    """The shapes and dtypes of such a model, to compile programs for."""
    described = describe(config, runtime)
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, parameter_dtype(name, config, runtime))
        for name, leaf in named_parameters(described).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(described), leaves)


@functools.cache
def _normal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(RANDOM_VALUES, np.float32)


def _random(shape: tuple[int, ...], dtype: Any, mean: float, scale: float):
    """Normal values on the host, again and again the same ones: nothing compiles."""
    return np.resize((mean + scale * _normal()).astype(dtype), shape)


class OutOfMemory(Exception):
    """Something needs more memory than it may take."""

    def __init__(self, needed: int, available: int):
        super().__init__(
            f"out of memory: needs {needed / 1e9:.3g} of {available / 1e9:.3g} GB"
        )
        self.needed_bytes = needed


def check_memory(needed: int, available: int) -> None:
    """Raises OutOfMemory if more bytes are needed than available."""
    if needed > available:
        raise OutOfMemory(needed, available)


def needed_bytes(compiled: Any) -> int:
    """Memory of a compiled program: arguments, results and temporaries."""
    sizes = compiled.memory_analysis()
    both = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    return both + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes


class Subject:
    """A model of random weights, made when it is first needed, and its programs.

    Args:
      config: the model.
      dtype: in which it computes; None is the device's best.
      memory: bytes that it may take.
    """

    def __init__(self, config: GriffinConfig, dtype: str | None, memory: int):
        self.config, self.memory = config, memory
        self.runtime = Runtime(compute_dtype=dtype)
        self._programs: dict[tuple[int, int | None], Programs] = {}

    def is_of(self, config: GriffinConfig, dtype: str | None) -> bool:
        """Whether it is such a model."""
        return (self.config, self.runtime) == (config, Runtime(compute_dtype=dtype))

    @functools.cached_property
    def model(self) -> Griffin:
        """The model.

        Raises:
          OutOfMemory: its parameters alone do not fit.
        """
        size = cost.parameter_bytes(self.config, self.runtime.dtype)
        check_memory(size, self.memory)
        return random_model(self.config, self.runtime)

    def programs(self, batch: int, tokens: int) -> "Programs":
        """The programs for rows that come to hold so many tokens.

        Those of a model whose cache does not grow are for any number of tokens, and
        compiled once.

        Raises:
          OutOfMemory: parameters and caches do not fit.
        """
        capacity = tokens if cache_lib.grows(self.config) else None
        sizes = {"dtype": self.runtime.dtype, "capacity": capacity}
        check_memory(cost.decode_bytes(self.config, batch, **sizes), self.memory)
        key = (batch, capacity)
        if key not in self._programs:
            # Those for texts of another length are not needed again.
            kept = {k: v for k, v in self._programs.items() if k[1] == capacity}
            self._programs = kept
            self._programs[key] = Programs(self.model, batch, capacity, self.memory)
        return self._programs[key]


class Programs:
    """The compiled programs of a model at one batch size and capacity."""

    def __init__(self, model: Griffin, batch: int, capacity: int | None, memory: int):
        self.batch, self.needed_bytes = batch, 0
        self._model, self._memory = model, memory
        self._sizes = {"batch_size": batch, "capacity": capacity}
        self._compiled: dict[str, tuple[Any, float]] = {}
        self._shapes = jax.eval_shape(
            functools.partial(programs.new_cache, **self._sizes), model
        )

    def _run(self, name: str, function: Any, *arguments: Any, **static: Any) -> Any:
        """Runs a program; one that `compile_for` did not see is compiled first."""
        if name not in self._compiled:
            self._prepare(name, function, *arguments, **static)
        return self._compiled[name][0](*arguments)

    def _prepare(self, name: str, function: Any, *shapes: Any, **static: Any) -> None:
        if name not in self._compiled:
            start = time.perf_counter()
            jitted = function.jitted(self.batch)
            compiled = jitted.lower(*shapes, **static).compile()
            self._compiled[name] = compiled, time.perf_counter() - start
        needed = needed_bytes(self._compiled[name][0])
        self.needed_bytes = max(self.needed_bytes, needed)
        check_memory(needed, self._memory)

    def compile_for(self, *lengths: int) -> float:
        """Compiles what reads texts of these lengths, and what writes.

        Returns:
          Seconds that these programs took, now or earlier.

        Raises:
          OutOfMemory: a program needs more memory than there is; nothing was allocated.
        """
        counts = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        sizes = {size for length in lengths for size in programs.plan_chunks(length)}
        for size in sizes:
            tokens = jax.ShapeDtypeStruct((self.batch, size), jnp.int32)
            shapes = self._model, self._shapes, tokens, counts
            self._prepare(f"read {size}", programs.read_chunk, *shapes)
        state = jax.eval_shape(self.start, self._shapes)
        arguments = self._decode_arguments(state, 1)
        self._prepare("write", programs.decode_block, *arguments, keep_logits=False)
        names = ["write", *(f"read {size}" for size in sizes)]
        return sum(self._compiled[name][1] for name in names)

    def new_cache(self) -> Cache:
        """An empty cache."""
        return programs.new_cache(self._model, **self._sizes)

    def synthetic_cache(self, length: int) -> Cache:
        """A cache of random values as if `length` tokens had been read."""

        def fill(leaf: Any) -> jax.Array:
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                values = _random(leaf.shape, leaf.dtype, 0.0, SYNTHETIC_SCALE)
            elif len(leaf.shape) == 1:  # the position of the next token
                values = np.full(leaf.shape, length, leaf.dtype)
            else:  # positions in the slots of a ring: the newest that falls on each
                newest, slots = length - 1, np.arange(leaf.shape[1])
                held = newest - (newest - slots) % len(slots)
                row = np.where(held >= 0, held, -1).astype(leaf.dtype)
                values = np.tile(row, (leaf.shape[0], 1))
            return jnp.asarray(values)

        return jax.tree.map(fill, self._shapes)

    def read(self, cache: Cache, tokens: np.ndarray) -> Cache:
        """The cache after tokens, int32 [B, T]; the one that goes in is used up."""
        done, total = 0, tokens.shape[1]
        for size in programs.plan_chunks(total):
            chunk = np.zeros((self.batch, size), np.int32)
            count = min(size, total - done)
            chunk[:, :count] = tokens[:, done : done + count]
            lengths = np.full(self.batch, count, np.int32)
            name = f"read {size}"
            cache = self._run(
                name, programs.read_chunk, self._model, cache, chunk, lengths
            )
            done += count
        return cache

    def start(self, cache: Cache) -> programs.DecodeState:
        """A state that writes after what the cache has read."""

        def array(value: int, dtype: Any = np.int32) -> jax.Array:
            return jnp.asarray(np.full(self.batch, value, dtype))

        return programs.DecodeState(
            caches=(cache,),
            history=History(array(0), array(1), seen=None),
            seeds=array(0, np.uint32),
            steps=array(0),
            limits=array(NEVER),
            done=array(False, bool),
        )

    def _decode_arguments(self, state: Any, count: int) -> tuple[Any, ...]:
        end_mask = np.zeros(self._model.config.vocab_size, bool)
        numbers = np.int32(count), np.int32(self.batch)
        return (self._model,), state, Sampling(temperature=0), end_mask, *numbers

    def write(self, state: programs.DecodeState, count: int) -> programs.DecodeState:
        """The state after `count` greedy tokens a row; the one that goes in is used up."""
        arguments = self._decode_arguments(state, count)
        state, _ = self._run(
            "write", programs.decode_block, *arguments, keep_logits=False
        )
        return state

    def rewind(self, state: programs.DecodeState, length: int) -> programs.DecodeState:
        """The state as if each row had read `length` tokens, and as large.

        Recurrent states stay what they are: their time does not depend on them.
        """
        return _rewind(state, self._model.config, np.int32(length))


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _rewind(state, config, length):
    [cache] = state.caches
    position = jnp.full_like(cache.next_position, length)
    layers = []
    for kind, layer in zip(config.block_types, cache.layers, strict=True):
        mixer = TEMPORAL_MIXERS[kind]
        if mixer.needs_capacity:
            layer = mixer.rewind(config, layer, position - position, position)
        layers.append(layer)
    return state._replace(caches=(Cache(tuple(layers), position),))


def random_tokens(config: GriffinConfig, *shape: int) -> np.ndarray:
    """Uniform tokens, int32."""
    rng = np.random.default_rng(0)
    return rng.integers(0, config.vocab_size, shape, np.int32)
