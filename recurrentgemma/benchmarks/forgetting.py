"""What models remember: loss by position, and how much of the past decides.

Both on the held-out files of nano's corpus, each read from its beginning.

    loss by position    mean nats of the tokens at positions [2^k, 2^(k+1)) of a file:
                        beyond the trained length (512 tokens for nano) it shows whether
                        a model goes on using, or is confused by, a longer past
    EffRem              effective remembrance (arXiv 2507.02782): the total-variation
                        distance between the distributions of the next token given the
                        whole past and given its last t tokens, read from an empty
                        state; 0 means that what came before has no effect
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from recurrentgemma.benchmarks import picture
from recurrentgemma.benchmarks.report import Column, Report, Row
from recurrentgemma.benchmarks.sweep import (
    MODELS_HELP,
    counts,
    earlier,
    measure_points,
    places,
)
from recurrentgemma.checkpoints import load
from recurrentgemma.generation.programs import plan_chunks
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import (
    PYTHON_STDLIB,
    read_documents,
    split_held_out,
)

KEY = ("name", "length", "most_files")
COLUMNS = (
    Column("", "name", 30),
    Column("files", "files", 6),
    Column("tokens", "length", 8),
    Column("nats, last half", "last_nats", 16),
    Column("EffRem of half", "last_distance", 16),
)
ENDS_A_FILE = 16
"""Places in a file at which EffRem is measured."""


def held_out_rows(tokenizer: Tokenizer, length: int, most: int) -> np.ndarray:
    """int32 [rows, length]: the beginnings of held-out files that are long enough.

    Raises:
      ValueError: none is.
    """
    _, documents = split_held_out(read_documents(PYTHON_STDLIB))
    rows = []
    for document in documents:
        tokens = tokenizer.encode(document.text)
        if len(tokens) >= length:
            rows.append(tokens[:length])
        if len(rows) == most:
            break
    if not rows:
        raise ValueError(
            f"--length: expected a length that a held-out file has, got {length:,}"
        )
    return np.array(rows, np.int32)


@jax.jit
def _read(model, tokens, targets, cache):
    hidden, cache = model(tokens, cache=cache)
    log_p = jax.nn.log_softmax(model.logits(hidden))
    nats = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return nats, cache


def nats_by_position(model: Griffin, rows: np.ndarray) -> np.ndarray:
    """float32 [rows, T - 1]: nats of each token after the first, int32 [rows, T].

    Read in chunks, so that memory does not grow with T.
    """
    cache = model.init_cache(len(rows), capacity=rows.shape[1])
    found, done = [], 0
    for size in plan_chunks(rows.shape[1] - 1):
        end = min(done + size, rows.shape[1] - 1)
        inputs, targets = rows[:, done:end], rows[:, done + 1 : end + 1]
        nats, cache = _read(model, inputs, targets, cache)
        found.append(np.asarray(nats))
        done = end
    return np.concatenate(found, axis=1)


@jax.jit
def _last_distribution(model, tokens):
    hidden, _ = model(tokens)
    return jax.nn.softmax(model.logits(hidden[:, -1:])[:, 0])


def effective_remembrance(
    model: Griffin, row: np.ndarray, ends: Sequence[int], spans: Sequence[int]
) -> np.ndarray:
    """Total-variation distances from the distribution given the whole past.

    Args:
      model: any.
      row: int32 [T], a text from its beginning.
      ends: numbers of tokens read, each at least the longest span.
      spans: numbers of last tokens, t.

    Returns:
      float32 [ends, spans], from 0 to 1.
    """
    whole = []
    cache, done = model.init_cache(1, capacity=len(row)), 0
    for end in sorted(ends):
        hidden, cache = model(jnp.asarray(row[None, done:end]), cache=cache)
        whole.append(jax.nn.softmax(model.logits(hidden[:, -1:])[0, 0]))
        done = end
    distances = []
    for span in spans:
        windows = np.stack([row[end - span : end] for end in sorted(ends)])
        near = _last_distribution(model, windows)
        distances.append(0.5 * jnp.abs(near - jnp.stack(whole)).sum(-1))
    return np.stack(distances, axis=1)


def measure(place: str, name: str, length: int, most_files: int) -> Row:
    """Both figures of a preset or checkpoint, under this name."""
    model, tokenizer = load(place)
    if tokenizer is None:
        raise ValueError(f"--models: {place} has no tokenizer")
    return remember(model, tokenizer, length, most_files, title=name)


def remember(
    model: Griffin, tokenizer: Tokenizer, length: int, most_files: int, *, title: str
) -> Row:
    """Both figures of a model, with a progress bar of this title."""
    texts = held_out_rows(tokenizer, length, most_files)
    nats = nats_by_position(model, texts)
    by_position = []
    for power in range(int(math.log2(length))):
        part = nats[:, 2**power - 1 : 2 ** (power + 1) - 1]
        if part.size:
            by_position.append({"length": 2**power, "nats": float(part.mean())})
    spans = [2**power for power in range(2, int(math.log2(length // 2)) + 1)]
    ends = np.linspace(spans[-1], length, ENDS_A_FILE, dtype=int).tolist()
    distances = np.concatenate(
        [
            effective_remembrance(model, row, ends, spans)
            for row in tqdm.tqdm(texts, desc=title)
        ]
    )
    remembrance = [
        {"length": span, "distance": float(mean), "upper_quartile": float(upper)}
        for span, mean, upper in zip(
            spans, distances.mean(0), np.quantile(distances, 0.75, axis=0), strict=True
        )
    ]
    return {
        "files": len(texts),
        "by_position": by_position,
        "effrem": remembrance,
        "last_nats": by_position[-1]["nats"],
        "last_distance": remembrance[-1]["distance"],
    }


def _line(row: Row) -> str:
    return f"{row['name']}, {row['files']} files of {row['length']:,} tokens"


def panels(rows: list[Row], line: Callable[[Row], str]) -> list[picture.Panel]:
    """Loss by position and EffRem of each row, whose line has this name."""
    return [
        picture.Panel(
            x_label,
            y_label,
            {
                line(row): [picture.Point(p["length"], p[key]) for p in row[part]]
                for row in rows
            },
            is_linear=True,
        )
        for x_label, y_label, part, key in (
            ("position in the file, tokens", "nats a token", "by_position", "nats"),
            ("last tokens given, t", "EffRem", "effrem", "distance"),
        )
    ]


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    flags.DEFINE_list("models", ["nano"], MODELS_HELP, flag_values=values)
    flags.DEFINE_string("length", "8k", "tokens of each file", flag_values=values)
    flags.DEFINE_integer("files", 8, "most files", lower_bound=1, flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """A row for each model, and a picture."""
    [length] = counts("length", [values["length"]])
    if length < 16:
        raise ValueError(f"--length: expected at least 16 tokens, got {length}")
    path = folder / "forgetting.json"
    rows = earlier(path, benchmark="forgetting").get("rows", ())
    report = Report(path, COLUMNS, key=KEY, rows=rows, benchmark="forgetting")
    known = places(values["models"])
    points: list[Row] = [
        dict(zip(KEY, (name, length, values["files"]), strict=True)) for name in known
    ]

    def measure_named(row: Row) -> Row:
        return measure(known[row["name"]], *row.values())

    measure_points(report, points, measure_named, title="models")
    title = "held-out files of nano's corpus"
    picture.draw(folder / "forgetting.png", title, panels(report.rows, _line))
