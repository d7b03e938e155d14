"""Whole programs of the 2B model in estimated time, with the kernels and without.

`prefill` reads a prompt at batch 1 and gives the next token's logits, in bfloat16;
`train step` is the real one of `training/step.py` with AdamW, float32 parameters,
bfloat16 compute, layers stacked and recomputed in the backward pass. "plain" is the same
program where the recurrence runs as plain JAX; attention is the same in both. What the
estimate is made of, and how good it is, `estimated_time` says. Sizes are the compiler's
own: it refuses what does not fit the chip.
"""

import contextlib
import functools
import importlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from recurrentgemma.benchmarks import ahead_of_time, estimated_time
from recurrentgemma.benchmarks.scan_table import Document, Row
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.config import PRESETS, GriffinConfig, Runtime
from recurrentgemma.griffin import Griffin, stack_layers
from recurrentgemma.training.data import Batch
from recurrentgemma.training.optimizer import OptimizerConfig, make_optimizer
from recurrentgemma.training.state import TrainState
from recurrentgemma.training.step import make_train_step

PRESET = "recurrentgemma-2b"
STEPS = 1000
"""Of the learning rate's schedule: nothing depends on it."""
PLAIN_OPS = ("linear_scan", "rg_lru", "rg_lru.with_gates", "recurrent_step")
Program = tuple[Callable[..., Any], tuple[Any, ...]]


def prefill(config: GriffinConfig, batch: int, length: int) -> Program:
    """(model, tokens) -> logits of the last token, and the cache."""
    runtime = Runtime(compute_dtype="bfloat16")
    model = nnx.eval_shape(lambda: Griffin(config, rngs=nnx.Rngs(0), runtime=runtime))

    def inference_dtype(path, leaf):
        matrix = path[-2:] != ("a_param",) and leaf.ndim > 1
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if matrix else leaf.dtype)

    def run(model, tokens):
        hidden, cache = model(tokens)
        return model.logits(hidden[:, -1:]), cache

    model = jax.tree_util.tree_map_with_path(inference_dtype, model)
    return run, (model, jax.ShapeDtypeStruct((batch, length), "int32"))


def train_step(config: GriffinConfig, batch: int, length: int) -> Program:
    """(state, batch) -> (state, metrics), the state that goes in used up."""
    runtime = Runtime(compute_dtype="bfloat16", remat=True)
    model = nnx.eval_shape(
        lambda: stack_layers(Griffin(config, rngs=nnx.Rngs(0), runtime=runtime))
    )
    optimizer = make_optimizer(OptimizerConfig(), STEPS, config)
    state = jax.eval_shape(
        lambda params: TrainState(
            params, optimizer.init(params), jnp.zeros((), jnp.int32)
        ),
        named_parameters(model),
    )
    ids = jax.ShapeDtypeStruct((batch, length), "int32")
    mask = jax.ShapeDtypeStruct((batch, length), "float32")
    return make_train_step(model, optimizer), (state, Batch(ids, ids, ids, mask))


PROGRAMS = {"prefill": prefill, "train step": train_step}
ROWS = [
    ("prefill", 1, 2048, "v5e"),
    ("prefill", 1, 8192, "v5e"),
    ("train step", 1, 2048, "v5p"),
    ("train step", 4, 2048, "v5p"),
]
"""Program, batch, length and generation: what fits one chip."""


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """Within it, the recurrence runs as plain JAX on TPU too."""
    with contextlib.ExitStack() as stack:
        for name in PLAIN_OPS:
            defaults = importlib.import_module(
                f"recurrentgemma.kernels.{name}"
            ).PLATFORM_DEFAULTS
            last = {"tpu": defaults["tpu"][-1:]}
            stack.enter_context(mock.patch.dict(defaults, last))
        yield


def compile_row(
    name: str, batch: int, length: int, generation: str, plain: bool, known: str | None
) -> Row:
    """What the compiler says of a program; called in a process of its own.

    Args:
      name: of `PROGRAMS`.
      batch, length: of the tokens.
      generation: a name of `ahead_of_time.CHIPS`.
      plain: whether without the kernels.
      known: a fingerprint; a program that has it is not compiled.
    """
    function, shapes = PROGRAMS[name](PRESETS[PRESET], batch, length)
    with plain_ops() if plain else contextlib.nullcontext():
        lowered = ahead_of_time.lower_for(generation, function, *shapes)
    row: Row = {"fingerprint": ahead_of_time.fingerprint(lowered.as_text())}
    if row["fingerprint"] == known:
        return row
    start = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return row | {
        "compile_s": time.perf_counter() - start,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def estimates(document: Document, rows: Any = tuple(ROWS)) -> None:
    """Adds a row for each of `ROWS`, with the kernels and without."""
    kernel_seconds = functools.cache(
        lambda generation, kernel: kernel.seconds(generation)
    )
    for name, batch, length, generation in rows:
        for plain in (False, True):
            row: Row = {
                "program": f"2B {name}: {'plain' if plain else 'kernels'}",
                "workload": f"({batch}, {length})",
                "dtype": "bfloat16",
                "generation": generation,
            }
            known = document.fingerprint(row)
            try:
                found, text = _compiled(name, batch, length, generation, plain, known)
            except RuntimeError as error:
                refused = re.search(r"RESOURCE_EXHAUSTED.*", str(error))
                if not refused:
                    raise
                document.add(row | {"refused": refused[0], "remark": "does not fit"})
                continue
            if text:
                of_kernel = functools.partial(kernel_seconds, generation)
                parts = estimated_time.estimate(text, generation, of_kernel)
                by_part = parts._asdict().items()
                row |= found | {"estimated_ms": 1e3 * sum(parts)}
                row |= {f"{part}_ms": 1e3 * seconds for part, seconds in by_part}
                row["remark"] = " ".join(f"{k} {1e3 * s:.4g}" for k, s in by_part)
                document.add(row)


def _compiled(*arguments: Any) -> tuple[Row, str]:
    """`compile_row` and the optimized HLO, empty if it was known."""
    with tempfile.TemporaryDirectory() as directory:
        code = (
            "import json\n"
            "from recurrentgemma.benchmarks import scan_model\n"
            f"print(json.dumps(scan_model.compile_row(*{arguments!r})))\n"
        )
        # jax cannot print every program of this compiler; the compiler itself can.
        flags = f"--xla_dump_to={directory} --xla_dump_hlo_as_text"
        output = ahead_of_time.run(code, environment={"XLA_FLAGS": flags})
        texts = [
            file.read_text() for file in Path(directory).glob("*after_codegen.txt")
        ]
        return json.loads(output.splitlines()[-1]), max(texts, key=len, default="")
