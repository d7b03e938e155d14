"""Training on from a checkpoint so that it reads beyond the length of its rows.

    recurrentgemma bench post_training --models nano --recipes zero,passed,exact

The recipe of arXiv 2507.02782: a few hundred steps in which rows begin with a state other
than nothing (`training.rows`). `exact` has no such beginning: its rows are --exact-rows
tokens long, with as many tokens a step, read in chunks with exact gradients of the whole
row. `before` is the checkpoint as it is, `zero` the same steps with rows that begin with
nothing. Loss by position and effective remembrance are those of `bench forgetting`, on
held-out files. All recipes take the same number of tokens of the same files.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from recurrentgemma import _validation as check
from recurrentgemma.benchmarks import forgetting, picture
from recurrentgemma.benchmarks.report import Column, Report, Row
from recurrentgemma.benchmarks.sweep import counts, earlier, measure_points
from recurrentgemma.checkpoints import load, named_parameters
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import (
    PYTHON_STDLIB,
    read_documents,
    split_held_out,
)
from recurrentgemma.training.data import Batch, Mixture, PackedTokens, encode_document
from recurrentgemma.training.mixture import CONTINUOUS, SHUFFLED
from recurrentgemma.training.optimizer import OptimizerConfig, make_optimizer
from recurrentgemma.training.rows import CARRIED, INITIAL_STATES, RowsConfig, init_rows
from recurrentgemma.training.state import new_state, with_parameters
from recurrentgemma.training.step import make_train_step

BEFORE, EXACT = "before", "exact"
RECIPES = (BEFORE, *INITIAL_STATES, EXACT)
KEY = ("name", "recipe", "steps", "length", "files")
COLUMNS = (
    Column("", "name", 8),
    Column("recipe", "recipe", 13),
    Column("steps", "steps", 6),
    Column("train loss", "train_loss", 11),
    Column("nats, last half", "last_nats", 16),
    Column("EffRem of half", "last_distance", 16),
)
LAST_STEPS = 20
"""Number of last steps whose mean loss is shown."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    steps: int
    rows: int
    """Rows of a step."""
    row_tokens: int
    exact_tokens: int
    """Tokens of a row of `exact`, which has fewer rows."""
    learning_rate: float

    def reading(self, recipe: str) -> tuple[RowsConfig, int, int]:
        """How rows are read, their number, and their tokens."""
        if recipe != EXACT:
            return RowsConfig(initial_state=recipe), self.rows, self.row_tokens
        rows = max(1, self.rows * self.row_tokens // self.exact_tokens)
        return RowsConfig(chunk_tokens=self.row_tokens), rows, self.exact_tokens


def training_tokens(tokenizer: Tokenizer, least: int, seed: int) -> list[list[int]]:
    """Training files of nano's corpus in random order, until there are `least` tokens."""
    documents, _ = split_held_out(read_documents(PYTHON_STDLIB))
    order = np.random.default_rng(seed).permutation(len(documents))
    found, count = [], 0
    for index in order:
        found.append(encode_document(tokenizer, documents[index]))
        count += len(found[-1])
        if count > least:
            break
    return found


def batches(
    packed: PackedTokens, plan: Plan, recipe: str, seed: int
) -> Iterator[Batch]:
    """Shuffled rows; for `carried` rows that go on where the last ones ended."""
    _, size, _ = plan.reading(recipe)
    order = CONTINUOUS if recipe == CARRIED else SHUFFLED
    mixture = Mixture([packed], batch_size=size, seed=seed, order=order)
    return map(mixture.batch, range(plan.steps))


def post_train(
    model: Griffin, tokenizer: Tokenizer, plan: Plan, recipe: str, seed: int = 0
) -> tuple[Griffin, list[float]]:
    """The model after the steps of a recipe, and the loss of each."""
    config, size, row_tokens = plan.reading(recipe)
    least = plan.steps * size * row_tokens
    packed = PackedTokens(training_tokens(tokenizer, least, seed), row_tokens)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=plan.learning_rate), plan.steps, model.config
    )
    params = {
        name: leaf.astype(jnp.float32) for name, leaf in named_parameters(model).items()
    }
    state = new_state(params, optimizer, init_rows(config, model, size))
    train_step = make_train_step(model, optimizer, rows=config, seed=seed)
    losses = []
    given = batches(packed, plan, recipe, seed)
    for batch in tqdm.tqdm(given, desc=recipe, total=plan.steps, unit="step"):
        state, metrics = train_step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    dtypes = {name: leaf.dtype for name, leaf in named_parameters(model).items()}
    trained = {name: leaf.astype(dtypes[name]) for name, leaf in state.params.items()}
    return with_parameters(jax.eval_shape(lambda: model), trained), losses


def measure(row: Row, plan: Plan) -> Row:
    """Trains by a recipe and measures what the model remembers."""
    model, tokenizer = load(row["name"])
    if tokenizer is None:
        raise ValueError(f"--models: {row['name']} has no tokenizer")
    losses: list[float] = []
    if row["recipe"] != BEFORE:
        model, losses = post_train(model, tokenizer, plan, row["recipe"])
    found = forgetting.remember(
        model, tokenizer, row["length"], row["files"], title=row["recipe"]
    )
    if losses:
        found |= {"losses": losses, "train_loss": float(np.mean(losses[-LAST_STEPS:]))}
    return found


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    for name, default, what in (
        ("models", ["nano"], "presets or checkpoints"),
        ("recipes", list(RECIPES), f"some of {', '.join(RECIPES)}"),
    ):
        flags.DEFINE_list(name, default, what, flag_values=values)
    for name, default, what in (
        ("steps", 500, "updates of the parameters"),
        ("rows", 4, "rows of a step"),
        ("files", 8, "most held-out files"),
    ):
        flags.DEFINE_integer(name, default, what, lower_bound=1, flag_values=values)
    for name, default, what in (
        ("row-tokens", "512", "tokens of a row, as trained"),
        ("exact-rows", "2k", "tokens of a row of `exact`"),
        ("length", "8k", "tokens of each held-out file"),
    ):
        flags.DEFINE_string(name, default, what, flag_values=values)
    what = "highest learning rate, after a warm-up"
    flags.DEFINE_float("learning-rate", 3e-4, what, flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """A row for each model and recipe, and a picture."""
    [row_tokens], [exact_tokens], [length] = (
        counts(name, [values[name]]) for name in ("row-tokens", "exact-rows", "length")
    )
    for recipe in values["recipes"]:
        check.choice("--recipes", recipe, RECIPES)
    plan = Plan(
        values["steps"],
        values["rows"],
        row_tokens,
        exact_tokens,
        values["learning-rate"],
    )
    path = folder / "post_training.json"
    conditions = {"benchmark": "post_training", "plan": dataclasses.asdict(plan)}
    rows = earlier(path, **conditions).get("rows", ())
    report = Report(path, COLUMNS, key=KEY, rows=rows, **conditions)
    points: list[Row] = [
        dict(zip(KEY, (name, recipe, plan.steps, length, values["files"]), strict=True))
        for name, recipe in itertools.product(values["models"], values["recipes"])
    ]
    measure_points(report, points, lambda row: measure(row, plan), title="recipes")
    title = f"{plan.steps} steps of {plan.rows} rows of {plan.row_tokens} tokens"
    panels = forgetting.panels(report.rows, lambda r: f"{r['name']}, {r['recipe']}")
    picture.draw(path.with_suffix(".png"), title, panels)
