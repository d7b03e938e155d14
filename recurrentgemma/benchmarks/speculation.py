"""Speculative decoding: nano proposes, a larger model of its tokens decides.

    python -m recurrentgemma.benchmarks.speculation

The larger model is made here: nano with more layers and wider MLPs, whose new parts
change nothing at first (their last matrices are zero; Net2Net, arXiv 1511.05641), then
trained on for some steps on the text that nano was trained on, so that the two differ as
a model and its smaller sibling do. `--target` takes another one.

Every way writes the same greedy and sampled text, which is checked, and the ways are
timed in turn. Accepted is the share of proposed tokens that were kept.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from recurrentgemma import cost
from recurrentgemma.benchmarks.paired import OURS, Measure, table, take_turns
from recurrentgemma.benchmarks.provenance import ROOT, provenance
from recurrentgemma.checkpoints import load, named_parameters
from recurrentgemma.generation.results import Sample
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

RESULTS = ROOT / "recurrentgemma" / "benchmarks" / "results" / "speculation.json"
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
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-4), steps)
    params = {n: p.astype(jnp.float32) for n, p in named_parameters(model).items()}
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    template = jax.eval_shape(lambda: with_parameters(model, params))
    step = make_train_step(template, optimizer)
    losses = []
    for i in tqdm.trange(steps, desc="training the larger model", file=sys.stderr):
        state, metrics = step(state, packed.shuffled_batch(i, 2, seed=1))
        losses.append(float(metrics["loss"]))
    return with_parameters(template, state.params), losses


class Way:
    """Decoding with or without a draft; a worker for `take_turns`."""

    peak_bytes = None

    def __init__(self, name: str, sampler: Sampler, request: dict[str, Any]):
        self.name = name
        self.sampler = sampler
        self._request = request

    def run(self) -> list[Sample]:
        """One sample of every prompt, one after another."""
        request = dict(self._request)
        prompts = request.pop("prompts")
        return [self.sampler([prompt], **request)[0] for prompt in prompts]

    def tokens_per_s(self) -> float:
        """New tokens for a second."""
        start = time.perf_counter()
        samples = self.run()
        return sum(len(s.tokens) for s in samples) / (time.perf_counter() - start)


def compare(
    target: Griffin, draft: Griffin, tokenizer: Tokenizer, arguments: Any
) -> list[dict[str, Any]]:
    """Every number of proposed tokens, greedy and sampled, against plain decoding.

    Raises:
      RuntimeError: a draft changed the text.
    """
    documents = split_held_out(read_documents(PYTHON_STDLIB), 0.02)[1]
    prompts = [d.text[:400] for d in documents if len(d.text) > 800]
    prompts = prompts[: arguments.prompts]
    results = []
    for name, sampling in SAMPLINGS.items():
        request = {
            "prompts": prompts,
            "sampling": sampling,
            "max_new_tokens": arguments.new_tokens,
            "end_tokens": [],
        }
        settings: dict[str, Any] = {"compile_ahead": False}
        plain = Way(PLAIN, Sampler(target, tokenizer, **settings), request)
        expected = plain.run()
        for count in arguments.draft_tokens:
            settings |= {"draft": draft, "num_draft_tokens": count}
            sampler = Sampler(target, tokenizer, **settings)
            way = Way(OURS, sampler, request)
            samples = way.run()
            same = [
                a.tokens == b.tokens for a, b in zip(samples, expected, strict=True)
            ]
            if not all(same):
                raise RuntimeError(f"{name}, {count}: {same.count(False)} other texts")
            calls = sum(s.num_calls for s in samples)
            tokens = sum(len(s.tokens) for s in samples)
            result = take_turns(
                Measure(
                    f"{name}, {count} proposed",
                    "tokens/s",
                    higher_is_better=True,
                    sample=lambda way, _: way.tokens_per_s(),  # type: ignore
                    rounds=arguments.rounds,
                ),
                [way, plain],  # type: ignore[arg-type]
            )
            accepted = (tokens - calls) / (calls * count)
            print(table([result]), f"\naccepted {accepted:.1%}, same text", flush=True)
            results.append(
                result.to_dict()
                | {"accepted": accepted, "tokens_per_call": tokens / calls}
            )
    return results


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="a larger model of the draft's tokens")
    parser.add_argument("--draft", default="nano")
    parser.add_argument("--steps", type=int, default=60, help="of training the target")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    draft, tokenizer = load(arguments.draft)
    assert tokenizer is not None
    losses: list[float] = []
    if arguments.target:
        target, _ = load(arguments.target)
    else:
        target, losses = train_on(grow(draft), tokenizer, arguments.steps)
    document = {
        **provenance(),
        "target": arguments.target or "nano, grown and trained on",
        "target_parameters": cost.num_parameters(target.config),
        "draft_parameters": cost.num_parameters(draft.config),
        "losses": losses,
        "results": compare(target, draft, tokenizer, arguments),
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
