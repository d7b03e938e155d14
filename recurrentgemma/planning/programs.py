"""The programs that a plan compiles: a train step, a prefill chunk, a decode step.

They are those that training and generation run, of arrays that exist as shapes alone, laid
out on the mesh by the rules of training.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recurrentgemma.cache import grows
from recurrentgemma.checkpoints.parameters import (
    describe,
    named_parameters,
    parameter_dtype,
)
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.griffin import Griffin, stack_layers
from recurrentgemma.kernels import meshes
from recurrentgemma.training.data import Batch
from recurrentgemma.training.optimizer import OptimizerConfig, make_optimizer
from recurrentgemma.training.sharding import (
    batch_sharding,
    spec_of,
    state_shardings,
)
from recurrentgemma.training.state import new_state
from recurrentgemma.training.step import make_train_step

COMPUTE_DTYPE = "bfloat16"


class Workload(NamedTuple):
    """What a program is asked to do.

    Attributes:
      program: A name of `PROGRAMS`.
      batch: B, rows of all chips together.
      length: T, tokens of a row: of a train step or a prefill, or read before a decode
        step.
    """

    program: str
    batch: int
    length: int


def lower(config: GriffinConfig, workload: Workload, mesh: Mesh) -> Any:
    """The lowered program, a `jax.stages.Lowered`.

    Raises:
      ValueError: there is no such program.
    """
    if workload.program not in PROGRAMS:
        raise ValueError(
            f"program: expected one of {', '.join(PROGRAMS)}, got {workload.program!r}"
        )
    # Not jax.set_mesh: arrays that tracing makes would belong to chips that are not here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return PROGRAMS[workload.program](config, workload, mesh)


def _train(config, workload, mesh):
    """A step of AdamW on float32 parameters; layers stacked and rematerialised."""
    runtime = Runtime(compute_dtype=COMPUTE_DTYPE, remat=True)
    model = jax.eval_shape(stack_layers, describe(config, runtime))
    optimizer = make_optimizer(OptimizerConfig(), steps=1000, model_config=config)

    params = named_parameters(model)
    state = jax.eval_shape(partial(new_state, optimizer=optimizer), params)
    state = _placed(state, state_shardings(state, mesh))
    shape, sharding = (workload.batch, workload.length), batch_sharding(mesh)

    def rows(dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    integers = (rows(jnp.int32),) * 3
    batch = Batch(*integers, mask=rows(jnp.float32))
    step: Any = make_train_step(model, optimizer)
    return step.lower(state, {}, batch)


def _prefill(config, workload, mesh):
    """Reads a prompt from an empty cache, as one chunk."""

    def read(model, tokens):
        hidden, cache = model(tokens)
        return model.logits(hidden[:, -1:]), cache

    tokens = jax.ShapeDtypeStruct(
        (workload.batch, workload.length), jnp.int32, sharding=batch_sharding(mesh)
    )
    return jax.jit(read).lower(_model(config, mesh), tokens)


def _decode(config, workload, mesh):
    """Takes one token a row; the cache is written in place."""
    model = _model(config, mesh)
    capacity = workload.length if grows(config) else None
    sizes = {"batch_size": workload.batch, "capacity": capacity}
    shapes = jax.eval_shape(partial(Griffin._init_cache, **sizes), model)
    cache = jax.tree.map(lambda leaf: _activation(leaf, mesh), shapes)
    tokens = _activation(jax.ShapeDtypeStruct((workload.batch, 1), jnp.int32), mesh)

    def step(model, cache, tokens):
        hidden, cache = model(tokens, cache=cache)
        return jnp.argmax(model.logits(hidden), axis=-1), cache

    # Left to choose, the compiler lays out the new cache in another way than the old one.
    kept = jax.tree.map(lambda leaf: leaf.sharding, cache)
    jitted = jax.jit(step, donate_argnums=1, out_shardings=(None, kept))
    return jitted.lower(model, cache, tokens)


PROGRAMS: dict[str, Callable[[GriffinConfig, Workload, Mesh], Any]] = {
    "train": _train,
    "prefill": _prefill,
    "decode": _decode,
}
"""Functions of the model's config, the workload and the mesh; they lower a program."""


def _model(config, mesh):
    """The model for inference, laid out on the mesh."""
    runtime = Runtime(compute_dtype=COMPUTE_DTYPE)
    model = describe(config, runtime)
    leaves = [
        jax.ShapeDtypeStruct(
            leaf.shape,
            parameter_dtype(name, config, runtime),
            sharding=NamedSharding(mesh, spec_of(name, leaf.shape, mesh)),
        )
        for name, leaf in named_parameters(model).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _activation(leaf, mesh):
    """A leaf of a cache: rows and channels lie where activations do."""
    words = {1: "b", 2: "bc", 3: "bsc", 4: "bsnh"}
    word = words[leaf.ndim] if jnp.issubdtype(leaf.dtype, jnp.floating) else "b"
    word = word.ljust(leaf.ndim, "s")
    abstract = mesh.abstract_mesh
    axes = (
        meshes.dividing_axes(abstract, meshes.LETTER_ROLES.get(letter), [size])
        for letter, size in zip(word, leaf.shape, strict=True)
    )
    spec = PartitionSpec(*(one or None for one in axes))
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(shapes, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )
