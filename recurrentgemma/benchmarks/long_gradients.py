"""Exact gradients of one row, chunk by chunk, against its length.

A point is the loss of a row of `length` random tokens and its gradient to every parameter
and to the first cache (`training.long_gradients`). The boundary caches, which grow with
the length, stand beside the peak of the memory; the rest of the peak is that of one
chunk. Up to --whole tokens the same gradients are taken by plain backpropagation too:
they must agree before anything is timed. The ceiling is the device's matrix product at
three times the FLOPs of a forward pass, as for a train step; reading every chunk once
more, without its logits, costs up to a third of that.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from recurrentgemma import cost
from recurrentgemma.benchmarks import device
from recurrentgemma.benchmarks.models import (
    TINY_PRESETS,
    Subject,
    check_memory,
    needed_bytes,
    random_tokens,
)
from recurrentgemma.benchmarks.paired import Disagreement
from recurrentgemma.benchmarks.picture import Panel, lines_of
from recurrentgemma.benchmarks.report import Column, Row, note
from recurrentgemma.benchmarks.sweep import Point, Sweep, counts, speed
from recurrentgemma.benchmarks.train import whole_rows
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.training.data import Batch
from recurrentgemma.training.long_gradients import long_gradients
from recurrentgemma.training.state import with_parameters
from recurrentgemma.training.step import batch_sums

MOST_SECONDS = 60.0
"""After so long no further sample of a point is taken."""
LARGEST_DIFFERENCE = 1e-4
"""Of gradients from those of plain backpropagation, as a share of the largest entry;
rounding in float32 leaves about 1e-6."""


def measure(subject: Subject, point: Point, values: dict[str, Any]) -> Row:
    """Takes gradients, of two chunks to warm up and then for each sample."""
    config, length = subject.config, point.length
    [chunk], [whole] = (counts(key, [values[key]]) for key in ("chunk", "whole"))
    settings = {"chunk_tokens": chunk, "keep_every": values["keep-every"]}
    # Parameters and their gradients.
    check_memory(2 * 4 * cost.num_parameters(config), subject.memory)
    batch = whole_rows(random_tokens(config, point.batch, length))
    found: Row = {"chunk": chunk, "keep_every": settings["keep_every"]}
    if length <= whole:
        found |= _plain(subject, point, batch, settings)
    start = time.perf_counter()
    short = jax.tree.map(lambda x: x[:, : 2 * chunk], batch)
    warm = jax.block_until_ready(long_gradients(subject.model, short, **settings))
    found["compile_s"] = time.perf_counter() - start
    device.reset_peak()
    samples, processor = _samples(
        point, lambda: long_gradients(subject.model, batch, **settings)
    )
    peak = device.peak_bytes()
    boundary = sum(leaf.nbytes for leaf in jax.tree.leaves(warm.cache))
    held = _boundaries(-(-length // chunk), settings["keep_every"]) * boundary
    found |= {"boundary_bytes": held, "processor_samples_s": processor}
    if peak is not None:
        found["rest_bytes"] = peak - held
    flops = cost.train_flops_per_token(config, length)
    ceiling = point.rates["product_flops_per_s"] / flops
    return found | speed(samples, point.batch * length, ceiling)


def _samples(point: Point, work: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Durations of calls, and the seconds of processor time that each took: on a CPU
    that others use too, the second is the one to compare."""
    samples, processor = [], []
    while len(samples) < point.repeats and sum(samples) < MOST_SECONDS:
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(work())
        samples.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return samples, processor


def _boundaries(chunks: int, keep_every: int) -> int:
    """Most boundary caches that are held at once."""
    return -(-chunks // keep_every) + min(keep_every, chunks) - 1


@jax.jit
def _gradients(model, batch):
    def loss(params):
        sums, _ = batch_sums(with_parameters(model, params), batch)
        return sums["loss"]

    return jax.grad(loss)(named_parameters(model))


def _plain(subject, point, batch: Batch, settings: dict[str, Any]) -> Row:
    """Plain backpropagation of the same row, which must agree."""
    compiled = _gradients.lower(subject.model, batch).compile()
    check_memory(needed_bytes(compiled), subject.memory)
    expected = compiled(subject.model, batch)
    ours = long_gradients(subject.model, batch, **settings).parameters
    difference = max(
        float(jnp.abs(ours[name] - leaf).max() / jnp.abs(leaf).max())
        for name, leaf in expected.items()
    )
    if not difference < LARGEST_DIFFERENCE:
        raise Disagreement(
            f"gradients of {point.length} tokens: {difference:.2g} of the largest entry "
            "from those of plain backpropagation"
        )
    samples, processor = _samples(point, lambda: compiled(subject.model, batch))
    return {
        "difference": difference,
        "whole_samples_s": samples,
        "whole_processor_samples_s": processor,
        "whole_tokens_per_s": point.batch * point.length / float(np.median(samples)),
        "whole_needed_bytes": needed_bytes(compiled),
    }


def summarize(rows: list[Row]) -> dict[str, Any]:
    """The time a token of the longest row over that of the longest whole one."""
    found = {}
    for name in {row["preset"] for row in rows}:
        done = [r for r in rows if r["preset"] == name and "tokens_per_s" in r]
        whole = [row for row in done if "whole_tokens_per_s" in row]
        if not whole:
            continue
        base, longest = (
            max(part, key=lambda row: row["length"]) for part in (whole, done)
        )
        tokens = base["length"], longest["length"]
        found[name] = {"whole_length": tokens[0], "longest": tokens[1]}
        for key, prefix in (("", "samples_s"), ("processor_", "processor_samples_s")):
            plain, short, long = (
                float(np.median(row[field])) / row["length"]
                for row, field in (
                    (base, f"whole_{prefix}"),
                    (base, prefix),
                    (longest, prefix),
                )
            )
            found[name] |= {
                f"{key}time_over_whole": long / plain,
                f"{key}time_over_chunks": long / short,
            }
        ratios = {key: f"{value:.3g}" for key, value in found[name].items()}
        note(
            f"{name}: a token of {tokens[1]:,} takes {ratios['time_over_whole']} times "
            f"as long as one of {tokens[0]:,} by plain backpropagation, "
            f"{ratios['time_over_chunks']} times as long as there in chunks; in "
            f"processor time {ratios['processor_time_over_whole']} and "
            f"{ratios['processor_time_over_chunks']} times"
        )
    return {"ratios": found}


def panels(rows: list[Row]) -> list[Panel]:
    """Speed, and the two parts of the memory."""
    speeds = lines_of(rows, "tokens_per_s")
    plain = lines_of(rows, "whole_tokens_per_s")
    speeds |= {f"{name}, plain": points for name, points in plain.items()}
    sizes = {}
    for key, label in (("boundary_bytes", "boundaries"), ("rest_bytes", "the rest")):
        scaled = [row | {"MB": row[key] / 1e6} for row in rows if key in row]
        lines = lines_of(scaled, "MB")
        sizes |= {f"{name}, {label}": points for name, points in lines.items()}
    return [Panel("tokens", "tokens/s", speeds), Panel("tokens", "MB", sizes)]


def _define_more(values: flags.FlagValues) -> None:
    flags.DEFINE_string("chunk", "2k", "tokens of a chunk", flag_values=values)
    what = "distance in chunks between the boundary caches that are held"
    flags.DEFINE_integer("keep-every", 1, what, lower_bound=1, flag_values=values)
    what = "most tokens that plain backpropagation reads too"
    flags.DEFINE_string("whole", "8k", what, flag_values=values)


SWEEP = Sweep(
    "long_gradients",
    measure,
    lengths="8k,32k,128k,1M",
    presets=tuple(TINY_PRESETS),
    columns=(
        Column("tokens/s", "tokens_per_s", 10),
        Column("plain", "whole_tokens_per_s", 8),
        Column("of ceiling %", "share_of_ceiling", 12, 100),
        Column("boundaries MB", "boundary_bytes", 13, 1e-6),
        Column("rest of peak MB", "rest_bytes", 15, 1e-6),
        Column("plain MB", "whole_needed_bytes", 9, 1e-6),
    ),
    panels=panels,
    define_more=_define_more,
    summarize=summarize,
)
define_flags, run = SWEEP.define_flags, SWEEP.run
