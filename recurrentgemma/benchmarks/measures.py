"""What `versus` compares: how each figure is made of the workers' commands, its ceiling."""

import dataclasses
from collections.abc import Callable
from functools import partial

from recurrentgemma import cost
from recurrentgemma.benchmarks.opponents.worker import Worker
from recurrentgemma.benchmarks.paired import Measure
from recurrentgemma.config import GriffinConfig

OFFICIAL_LONGEST_PREFILL = 8192
"""The official attention scores are T x T; 32768 would need 26 GB for one layer."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and repetitions of a comparison."""

    prefill_lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    decode_batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    new_tokens: int = 64
    train_length: int | None = 2048
    """None: training is not compared."""
    first_call_prompts: tuple[int, ...] = (200, 331, 467)
    """Lengths that nobody has seen before."""
    check_lengths: tuple[int, ...] = (600, 1500)
    """Lengths at which logits are compared, within and beyond the window."""
    rounds: int = 5
    rounds_of_long_prefill: int = 2
    """Beyond what the official code can do, which takes minutes."""
    rounds_of_compilation: int = 3
    """Each in new processes; 0: compilation is not compared."""

    @property
    def compile_length(self) -> int:
        """The prefill whose compilation is timed."""
        return min(max(self.prefill_lengths), OFFICIAL_LONGEST_PREFILL)


def compilations(plan: Plan) -> list[Measure]:
    """What first calls take beyond second ones, in processes that are new each round."""

    def beyond_second(work: Callable[[Worker], float], worker: Worker, _: int) -> float:
        worker.restart()
        return work(worker) - work(worker)

    def train(worker: Worker) -> float:
        return worker.ask("train", length=plan.train_length)["seconds"]

    def forward_and_decode(worker: Worker) -> float:
        forward = worker.ask("prefill", length=plan.compile_length)["seconds"]
        return forward + _generate(worker, plan, 1, 1 + plan.new_tokens)

    works = {"forward and decode": forward_and_decode}
    if plan.train_length is not None:
        works = {"train step": train} | works
    return [
        Measure(
            f"compile {name}",
            "s",
            higher_is_better=False,
            sample=partial(beyond_second, work),
            rounds=plan.rounds_of_compilation,
            warm_up=False,
            leave_out=("transformers",),
        )
        for name, work in works.items()
        if plan.rounds_of_compilation
    ]


def measures(plan: Plan) -> list[Measure]:
    """Every other row, cheap ones first."""

    def decode(batch: int, worker: Worker, _: int) -> float:
        # The difference is decode alone: the prompt and all fixed costs cancel.
        with_decode = _generate(worker, plan, batch, 1 + plan.new_tokens)
        difference = with_decode - _generate(worker, plan, batch, 1)
        return batch * plan.new_tokens / difference

    def prefill(length: int, worker: Worker, _: int) -> float:
        return length / worker.ask("prefill", length=length)["seconds"]

    def first_call(worker: Worker, index: int) -> float:
        sizes = {"prompt": plan.first_call_prompts[index], "new_tokens": 1}
        return worker.ask("generate", batch=1, **sizes)["seconds"]

    def train(length: int, worker: Worker, _: int) -> float:
        return length / worker.ask("train", length=length)["seconds"]

    rate = partial(Measure, unit="tokens/s", higher_is_better=True, rounds=plan.rounds)
    found = [
        rate(f"decode, batch {batch}", sample=partial(decode, batch))
        for batch in plan.decode_batches
    ]
    for length in plan.prefill_lengths:
        is_long = length > OFFICIAL_LONGEST_PREFILL
        measure = rate(
            f"prefill {length}",
            sample=partial(prefill, length),
            rounds=plan.rounds_of_long_prefill if is_long else plan.rounds,
            leave_out=("official",) if is_long else (),
        )
        found.append(measure)
    if plan.first_call_prompts:
        first_calls = Measure(
            "first call, new prompt length",
            "s",
            higher_is_better=False,
            sample=first_call,
            rounds=len(plan.first_call_prompts),
            warm_up=False,
        )
        found.append(first_calls)
    if plan.train_length is not None:
        name = f"train step {plan.train_length}"
        found.append(rate(name, sample=partial(train, plan.train_length)))
    return found


def _generate(worker: Worker, plan: Plan, batch: int, new_tokens: int) -> float:
    """Seconds to continue prompts of `plan.prompt` tokens."""
    sizes = {"batch": batch, "prompt": plan.prompt, "new_tokens": new_tokens}
    return worker.ask("generate", **sizes)["seconds"]


def ceilings(
    config: GriffinConfig, plan: Plan, rates: dict[str, float]
) -> dict[str, float]:
    """What this machine allows, in tokens/s, by the names of `measures`.

    Args:
      config: The model.
      plan: Sizes.
      rates: What `device.rates` returned for the batches of the plan, in float32.
    """
    product = rates["product_flops_per_s"]
    logits_flops = 2 * config.vocab_size * config.width
    found = {}
    for length in plan.prefill_lengths:  # the logits of a prompt are not computed
        flops = cost.forward_flops_per_token(config, length) - logits_flops
        found[f"prefill {length}"] = product / flops
    if plan.train_length is not None:
        flops = cost.train_flops_per_token(config, plan.train_length)
        found[f"train step {plan.train_length}"] = product / flops
    for batch in plan.decode_batches:
        sizes = {"dtype": "float32", "capacity": plan.prompt + plan.new_tokens}
        moved = cost.decode_bytes(config, batch, **sizes)
        steps_per_s = rates[f"read_{batch}_rows_bytes_per_s"] / moved
        found[f"decode, batch {batch}"] = batch * steps_per_s
    return found
