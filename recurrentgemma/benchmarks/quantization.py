"""What weight-only int8 costs and saves: loss, bytes, and speed of the decode step.

Loss is that of `held_out` on a part of its documents. Speed is that of a greedy decode
loop without a sampler, in tokens for each second of CPU time (on another device, of wall
time), both models in turn in every round: the ratio is formed inside the round. Besides
the models named, one with random weights that is too large for the caches of a CPU.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from recurrentgemma.benchmarks.held_out import held_out_loss
from recurrentgemma.benchmarks.paired import OURS, Measure, compare
from recurrentgemma.benchmarks.report import Column, Report, Row
from recurrentgemma.benchmarks.versus import CONFIG
from recurrentgemma.checkpoints import load, save
from recurrentgemma.griffin import Griffin
from recurrentgemma.training.corpus import (
    PYTHON_STDLIB,
    read_documents,
    split_held_out,
)

RANDOM = "67M random"
UNQUANTIZED = "as stored"
ROW_TOKENS = 512


class Decoder:
    """A model's decode loop, as a worker of `compare`."""

    def __init__(self, name: str, model: Griffin, batch_size: int, steps: int):
        self.name = name
        self.peak_bytes: int | None = None
        self._model, self._steps = model, steps
        self._cache = model.init_cache(batch_size, capacity=steps)
        self._tokens = jnp.zeros((batch_size, 1), jnp.int32)
        self._clock: Callable[[], float] = time.perf_counter
        if jax.default_backend() == "cpu":
            self._clock = time.process_time  # other processes do not count

    def tokens_per_s(self, _: int) -> float:
        """Speed of one run."""
        start = self._clock()
        jax.block_until_ready(
            _decode(self._model, self._tokens, self._cache, self._steps)
        )
        return self._tokens.size * self._steps / (self._clock() - start)


@jax.jit
def _decode(model, tokens, cache, steps):
    def step(_, carry):
        tokens, cache = carry
        hidden, cache = model(tokens, cache=cache)
        return model.logits(hidden).argmax(-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, steps, step, (tokens, cache))


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    flags.DEFINE_list("models", ["nano"], "checkpoints", flag_values=values)
    for name, default, what in (
        ("documents", 40, "held-out documents that are read"),
        ("steps", 64, "tokens of a decode loop"),
        ("repeats", 9, "paired rounds"),
    ):
        flags.DEFINE_integer(name, default, what, lower_bound=1, flag_values=values)
    flags.DEFINE_list("batch", ["1", "8"], "rows of a decode step", flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """A row for each model and way to hold its matrices."""
    _, documents = split_held_out(read_documents(PYTHON_STDLIB))
    documents = documents[: values["documents"]]
    batch_sizes = [int(size) for size in values["batch"]]
    report = Report(
        folder / "quantization.json",
        [
            Column("", "model", 12),
            Column("matrices", "name", 12),
            Column("MB", "parameter_bytes", 8, 1e-6),
            Column("nats 512", "held_out/loss", 9),
            Column("bits/byte", "held_out/bits_per_byte", 10),
            *(
                column
                for size in batch_sizes
                for column in (
                    Column(f"tok/s b{size}", f"decode/{size}/tokens_per_s", 10),
                    Column("is x", f"decode/{size}/advantage", 6),
                )
            ),
        ],
        key=("model", "name"),
        held_out_documents=len(documents),
        decode_steps=values["steps"],
        speed="tokens for each second of CPU time; wall time on other devices",
    )
    with tempfile.TemporaryDirectory() as scratch:
        for path in [*values["models"], RANDOM]:
            source = path
            if path == RANDOM:
                source = str(Path(scratch, "model"))
                save(source, Griffin(CONFIG, rngs=nnx.Rngs(0)), None)
            models = {
                UNQUANTIZED: load(source),
                "int8": load(source, quantize="int8"),
            }
            speeds = _speeds(models, batch_sizes, values)
            for name, (model, tokenizer) in models.items():
                row: Row = {
                    "model": path,
                    "name": name,
                    "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(model)),
                    "decode": speeds[name],
                }
                if tokenizer is not None:
                    row["held_out"] = held_out_loss(
                        model, tokenizer, documents, ROW_TOKENS
                    )
                report.add(row)


def _speeds(models, batch_sizes, values) -> dict[str, Row]:
    """By model and batch size: median, samples, and times the speed as stored."""
    found: dict[str, Row] = {name: {} for name in models}
    for size in batch_sizes:
        # `compare` forms ratios of the worker of this name.
        workers = [
            Decoder(OURS if n == "int8" else n, m, size, values["steps"])
            for n, (m, _) in models.items()
        ]
        measure = Measure(
            f"decode, batch {size}",
            "tokens/s",
            higher_is_better=True,
            sample=Decoder.tokens_per_s,
            rounds=values["repeats"],
        )
        row = compare(measure, workers)
        for name in models:
            worker = OURS if name == "int8" else name
            found[name][str(size)] = {
                "tokens_per_s": row["median"][worker],
                "advantage": row["advantage"][UNQUANTIZED] if worker == OURS else None,
                "samples": row["samples"][worker],
                "load_average": row["load_average"],
            }
    return found
