"""Fine-tuning on a small instruction set: adapters beside all parameters.

Both begin at the same model and read the same batches of `instructions`. Reported are
the loss of the responses to held-out prompts, the share of them that greedy decoding
answers exactly, and the loss on text of the model's own corpus, before and after: what
fine-tuning costs elsewhere.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags
from flax import nnx

from recurrentgemma.adapters import TRAINED, add_adapters
from recurrentgemma.benchmarks.instructions import Example, batches, encode, examples
from recurrentgemma.benchmarks.report import Column, Report, Row
from recurrentgemma.checkpoints import load, named_parameters
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import (
    PYTHON_STDLIB,
    read_documents,
    split_held_out,
)
from recurrentgemma.training.data import Batch, PackedTokens, encode_document
from recurrentgemma.training.selection import split_parameters
from recurrentgemma.training.state import new_state, with_parameters
from recurrentgemma.training.step import make_train_step, mean_loss

HELD_OUT = 256
"""Number of held-out examples."""
ANSWERED = 32
"""Number of those that are answered."""
ROW_TOKENS = 64
MAX_ANSWER_TOKENS = 24
CORPUS_BATCHES = 2
CORPUS_ROW_TOKENS = 512
FULL_LEARNING_RATE_RATIO = 0.1
"""Learning rate of all parameters as a share of that of adapters."""


def fine_tune(
    model: Griffin,
    data: Sequence[Batch],
    *,
    learning_rate: float,
    trained: Sequence[str] = ("*",),
) -> tuple[Griffin, int]:
    """The model after a step of Adam on each batch; the learning rate falls to 0.

    Args:
      model: float32; it stays as it is.
      data: a batch for each step.
      learning_rate: of the first step.
      trained: patterns of the names of what is trained; all else is frozen.

    Returns:
      The model, and the number of trained parameters.
    """
    params, frozen = split_parameters(named_parameters(model), tuple(trained), ())
    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, len(data)))
    state = new_state(params, optimizer)
    train_step = make_train_step(model, optimizer)
    for batch in data:
        state, _ = train_step(state, frozen, batch)
    size = sum(leaf.size for leaf in params.values())
    return with_parameters(model, state.params | frozen), size


def loss_of(model: Griffin, data: Sequence[Batch]) -> float:
    """Mean nats of a counted target, over batches with as many of them each."""
    return float(np.mean([_mean_loss(model, batch) for batch in data]))


_mean_loss = jax.jit(mean_loss)


def share_answered(
    model: Griffin, tokenizer: Tokenizer, asked: Sequence[Example]
) -> float:
    """Share of the prompts whose greedy continuation is the response."""
    samples = Sampler(model, tokenizer, compile_ahead=False)(
        [example.prompt for example in asked],
        max_new_tokens=MAX_ANSWER_TOKENS,
        sampling=Sampling(temperature=0),
        stop=["\n"],
        batch_size=len(asked),
    )
    pairs = zip(samples, asked, strict=True)
    return sum(s.text == e.response.rstrip("\n") for s, e in pairs) / len(asked)


def corpus_rows(tokenizer: Tokenizer) -> list[Batch]:
    """Held-out rows of the corpus of the bundled model."""
    _, documents = split_held_out(read_documents(PYTHON_STDLIB))
    ids = [encode_document(tokenizer, document) for document in documents[:40]]
    packed = PackedTokens(ids, CORPUS_ROW_TOKENS)
    return [packed.rows(np.arange(8 * i, 8 * i + 8)) for i in range(CORPUS_BATCHES)]


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("model", "nano", "a preset or checkpoint", flag_values=values)
    for name, default, what in (
        ("rank", 8, "rank of the adapters"),
        ("steps", 150, "number of steps"),
        ("batch", 8, "examples of a step"),
    ):
        flags.DEFINE_integer(name, default, what, lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "learning-rate", 5e-3, "of the adapters' first step", flag_values=values
    )


def run(values: dict[str, Any], folder: Path) -> None:
    """A row for the model as it is, with adapters, and with all parameters trained."""
    model, tokenizer = load(values["model"], param_dtype="float32")
    if tokenizer is None:
        raise ValueError(f"{values['model']} has no tokenizer")
    count = values["steps"] * values["batch"]
    drawn = examples(HELD_OUT + count)
    held_out, shown = drawn[:HELD_OUT], drawn[HELD_OUT:]
    data = list(
        batches(
            tokenizer,
            shown,
            steps=values["steps"],
            batch_size=values["batch"],
            row_tokens=ROW_TOKENS,
        )
    )
    asked = [encode(tokenizer, held_out, ROW_TOKENS)]
    corpus = corpus_rows(tokenizer)
    rate = values["learning-rate"]
    report = Report(
        folder / "adapters.json",
        [
            Column("", "name", 20),
            Column("trained", "trained"),
            Column("nats, held out", "held_out_loss", 16),
            Column("answered", "answered"),
            Column("nats, corpus", "corpus_loss", 14),
            Column("CPU s", "cpu_s"),
        ],
        model=values["model"],
        **{name: values[name] for name in ("rank", "steps", "batch", "learning-rate")},
    )

    def measure(name: str, tuned: Griffin, trained: int = 0, cpu_s: float = 0) -> Row:
        return {
            "name": name,
            "trained": trained,
            "held_out_loss": loss_of(tuned, asked),
            "answered": share_answered(tuned, tokenizer, held_out[:ANSWERED]),
            "corpus_loss": loss_of(tuned, corpus),
            "cpu_s": cpu_s,
        }

    report.add(measure("as it is", model))
    adapted = add_adapters(model, rank=values["rank"], rngs=nnx.Rngs(0))
    for name, start, trained, learning_rate in (
        (f"LoRA, rank {values['rank']}", adapted, TRAINED, rate),
        ("all parameters", model, ("*",), FULL_LEARNING_RATE_RATIO * rate),
    ):
        before = time.process_time()
        tuned, size = fine_tune(
            start, data, learning_rate=learning_rate, trained=trained
        )
        jax.block_until_ready(tuned)
        report.add(measure(name, tuned, size, time.process_time() - before))
