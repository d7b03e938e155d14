"""Speculative decoding: nano proposes, a larger model of its tokens decides.

The larger model is made here: nano with more layers and wider MLPs, whose new parts
change nothing at first (their last matrices are zero; Net2Net, arXiv 1511.05641), then
trained on for some steps on the text that nano was trained on, so that the two differ as
a model and its smaller sibling do. `--target` takes another one.

Both ways must write the same greedy and sampled text before they are timed in turn.
Accepted is the share of proposed tokens that were kept.
"""

import argparse
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from recurrentgemma import cost
from recurrentgemma.benchmarks.paired import OURS, Way, columns, compare_ways
from recurrentgemma.benchmarks.report import Column, Report
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
from recurrentgemma.training.data import PackedTokens, encode_document
from recurrentgemma.training.optimizer import OptimizerConfig, make_optimizer
from recurrentgemma.training.state import TrainState, with_parameters
from recurrentgemma.training.step import make_train_step

LAYERS_FACTOR = 4
MLP_FACTOR = 4
LAST_MATRICES = ("linear_out", "proj_out", "down")
SAMPLINGS = {"greedy": Sampling(0), "temperature 0.8": Sampling(0.8)}
PLAIN = "plain decoding"


def grow(model: Griffin) -> Griffin:
    """A larger model that computes what this one does.

    Layer i of the model is layer `LAYERS_FACTOR` * i of the pattern's repetitions, the
    others add zero; MLPs are wider by units that are not connected to the output.
    """
    period = len(model.config.block_pattern)
    config = dataclasses.replace(
        model.config,
        num_layers=model.config.num_layers * LAYERS_FACTOR,
        mlp_width=model.config.mlp_width * MLP_FACTOR,
    )
    grown = Griffin(config, rngs=nnx.Rngs(0))
    old = named_parameters(model)
    values = {}
    for name, value in named_parameters(grown).items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            group, place = divmod(int(layer), period)
            source, is_new = divmod(group, LAYERS_FACTOR)
            if name.split(".")[-2] in LAST_MATRICES:
                value = jnp.zeros_like(value)
            old_name = f"blocks.{source * period + place}.{rest}"
        else:
            old_name, is_new = name, False
        if not is_new:
            corner = tuple(slice(n) for n in old[old_name].shape)
            value = value.at[corner].set(old[old_name].astype(value.dtype))
        values[name] = value
    return with_parameters(grown, values)


def train_on(
    model: Griffin, tokenizer: Tokenizer, steps: int, row_tokens: int = 512
) -> tuple[Griffin, list[float]]:
    """The model after some steps on the standard library, and the loss of each."""
    documents, _ = split_held_out(read_documents(PYTHON_STDLIB), 0.02)
    rng = np.random.default_rng(1)
    chosen = rng.permutation(len(documents))[: 4 * steps]
    encoded = [encode_document(tokenizer, documents[i]) for i in chosen]
    packed = PackedTokens(encoded, row_tokens)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-4), steps, model.config)
    params = {n: p.astype(jnp.float32) for n, p in named_parameters(model).items()}
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    template = jax.eval_shape(lambda: with_parameters(model, params))
    step = make_train_step(template, optimizer)
    losses = []
    for i in tqdm.trange(steps, desc="training the larger model", file=sys.stderr):
        state, metrics = step(state, packed.shuffled_batch(i, 2, seed=1))
        losses.append(float(metrics["loss"]))
    return with_parameters(template, state.params), losses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--target", help="a larger model of the draft's tokens")
    parser.add_argument("--draft", default="nano")
    parser.add_argument("--steps", type=int, default=60, help="of training the target")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)


def run(options: argparse.Namespace) -> None:
    """Every number of proposed tokens, greedy and sampled, against plain decoding.

    Raises:
      Disagreement: a draft changed the text.
    """
    draft, tokenizer = load(options.draft)
    assert tokenizer is not None
    losses: list[float] = []
    if options.target:
        target, _ = load(options.target)
    else:
        target, losses = train_on(grow(draft), tokenizer, options.steps)
    report = Report(
        options.output,
        columns([OURS, PLAIN], Column("accepted", "accepted")),
        target=options.target or "nano, grown and trained on",
        target_parameters=cost.num_parameters(target.config),
        draft_parameters=cost.num_parameters(draft.config),
        losses=losses,
    )
    documents = split_held_out(read_documents(PYTHON_STDLIB), 0.02)[1]
    prompts = [d.text[:400] for d in documents if len(d.text) > 800][: options.prompts]

    def way(name: str, sampler: Sampler, sampling: Sampling) -> Way:
        request = {"sampling": sampling, "max_new_tokens": options.new_tokens}
        return Way(
            name, lambda: [sampler([p], end_tokens=[], **request)[0] for p in prompts]
        )

    for name, sampling in SAMPLINGS.items():
        plain = way(PLAIN, Sampler(target, tokenizer), sampling)
        for count in options.draft_tokens:
            sampler = Sampler(target, tokenizer, draft=draft, num_draft_tokens=count)
            ways = [way(OURS, sampler, sampling), plain]
            row, samples = compare_ways(
                f"{name}, {count} proposed", ways, options.rounds
            )
            calls = sum(sample.num_calls for sample in samples)
            tokens = sum(len(sample.tokens) for sample in samples)
            row["accepted"] = (tokens - calls) / (calls * count)
            report.add(row | {"tokens_per_call": tokens / calls})
