"""Fine-tuning on a small instruction set: learned prefix, adapters, all parameters.

All begin at the same model and read the same batches of `instructions`. Reported are
the loss of the responses to held-out prompts, the share of them that greedy decoding
answers exactly, and the loss on text of the model's own corpus, before and after: what
fine-tuning costs elsewhere. A prefix costs nothing there, since it can be left away.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags
from flax import nnx

from recurrentgemma.adapters import TRAINED, add_adapters
from recurrentgemma.benchmarks.instructions import Example, batches, encode, examples
from recurrentgemma.benchmarks.report import Column, Report
from recurrentgemma.checkpoints import load, named_parameters
from recurrentgemma.generation.prefix import Prefix
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
from recurrentgemma.training.learned_prefix import (
    LearnedPrefixConfig,
    learn_prefix,
    loss_after,
    num_values,
)
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
PREFIX_TOKENS = 512
"""Tokens of the examples that a prefix begins as: more than nano's window."""
FULL_LEARNING_RATE_RATIO = 0.1
"""Learning rate of all parameters as a share of that of adapters."""


def fine_tune(
    model: Griffin,
    data: Sequence[Batch],
    *,
    learning_rate: float,
    trained: Sequence[str] = ("*",),
) -> Griffin:
    """The model after a step of Adam on each batch; the learning rate falls to 0.

    Args:
      model: float32; it stays as it is.
      data: a batch for each step.
      learning_rate: of the first step.
      trained: patterns of the names of what is trained; all else is frozen.
    """
    params, frozen = split_parameters(named_parameters(model), tuple(trained), ())
    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, len(data)))
    state = new_state(params, optimizer)
    train_step = make_train_step(model, optimizer)
    for batch in data:
        state, _ = train_step(state, frozen, batch)
    return with_parameters(model, state.params | frozen)


def loss_of(model: Griffin, data: Sequence[Batch]) -> float:
    """Mean nats of a counted target, over batches with as many of them each."""
    return float(np.mean([_mean_loss(model, batch) for batch in data]))


_mean_loss = jax.jit(mean_loss)


def share_answered(
    model: Griffin,
    tokenizer: Tokenizer,
    asked: Sequence[Example],
    prefix: Prefix | None = None,
) -> float:
    """Share of the prompts whose greedy continuation, after a prefix, is the response."""
    samples = Sampler(model, tokenizer, compile_ahead=False)(
        [example.prompt for example in asked],
        max_new_tokens=MAX_ANSWER_TOKENS,
        sampling=Sampling(temperature=0),
        stop=["\n"],
        batch_size=len(asked),
        prefix=prefix,
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
    for name, default, what in (
        ("learning-rate", 5e-3, "of the adapters' first step"),
        ("prefix-learning-rate", 1e-1, "of the first step of a learned prefix"),
    ):
        flags.DEFINE_float(name, default, what, lower_bound=0.0, flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """A row for each way; adapters also with about as many values as the prefix."""
    model, tokenizer = load(values["model"], param_dtype="float32")
    if tokenizer is None:
        raise ValueError(f"{values['model']} has no tokenizer")
    steps, rate = values["steps"], values["learning-rate"]
    drawn = examples(HELD_OUT + steps * values["batch"])
    held_out, shown = drawn[:HELD_OUT], drawn[HELD_OUT:]
    sizes = {"batch_size": values["batch"], "row_tokens": ROW_TOKENS}
    data = list(batches(tokenizer, shown, steps=steps, **sizes))
    asked = encode(tokenizer, held_out, ROW_TOKENS)
    corpus = corpus_rows(tokenizer)
    flags_shown = ("steps", "batch", "learning-rate", "prefix-learning-rate")
    report = Report(
        folder / "adapters.json",
        [
            Column("", "name", 28),
            Column("trained", "trained"),
            Column("nats, held out", "held_out_loss", 16),
            Column("answered", "answered"),
            Column("nats, corpus", "corpus_loss", 14),
            Column("CPU s", "cpu_s"),
        ],
        model=values["model"],
        **{name: values[name] for name in flags_shown},
    )

    def add(name: str, tuned: Griffin, prefix: Prefix | None = None, **row: Any):
        answered = share_answered(tuned, tokenizer, held_out[:ANSWERED], prefix)
        loss = loss_after(tuned, prefix, asked) if prefix else loss_of(tuned, [asked])
        found = {"held_out_loss": loss, "answered": answered}
        report.add({"name": name, "trained": 0, "cpu_s": 0.0} | row | found)

    own_loss = loss_of(model, corpus)
    add("as it is", model, corpus_loss=own_loss)
    text = "".join(example.prompt + example.response for example in shown)
    tokens = tokenizer.encode(text)[: PREFIX_TOKENS + 1]
    read = Sampler(model, tokenizer, compile_ahead=False).prefill(tokens)
    add(f"{PREFIX_TOKENS} tokens of examples", model, read, corpus_loss=own_loss)
    config = LearnedPrefixConfig(steps, values["prefix-learning-rate"])
    (learned, _), cpu_s = _timed(learn_prefix, model, read, data, config)
    learned_size = num_values(learned)
    add(
        "the same, learned",
        model,
        learned,
        trained=learned_size,
        cpu_s=cpu_s,
        corpus_loss=own_loss,  # without the prefix the model is what it was
    )
    a_rank = add_adapters(model, rank=1, rngs=nnx.Rngs(0))
    rank_size = sum(leaf.size for leaf in _chosen(a_rank, TRAINED).values())
    ways = [
        (f"LoRA, rank {rank}", add_adapters(model, rank=rank, rngs=nnx.Rngs(0)))
        for rank in sorted({max(round(learned_size / rank_size), 1), values["rank"]})
    ]
    for name, start, trained, learning_rate in (
        *((name, adapted, TRAINED, rate) for name, adapted in ways),
        ("all parameters", model, ("*",), FULL_LEARNING_RATE_RATIO * rate),
    ):
        tuned, cpu_s = _timed(
            fine_tune, start, data, learning_rate=learning_rate, trained=trained
        )
        size = sum(leaf.size for leaf in _chosen(start, trained).values())
        loss = loss_of(tuned, corpus)
        add(name, tuned, trained=size, cpu_s=cpu_s, corpus_loss=loss)


def _chosen(model: Griffin, patterns: Sequence[str]) -> dict[str, jax.Array]:
    return split_parameters(named_parameters(model), tuple(patterns), ())[0]


def _timed(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a function returns, and the seconds of processor time that it took."""
    before = time.process_time()
    found = jax.block_until_ready(function(*arguments, **named))
    return found, time.process_time() - before
