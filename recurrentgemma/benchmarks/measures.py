"""What `versus` compares: how each figure is made of the workers' commands."""

import dataclasses

from recurrentgemma.benchmarks.opponents.worker import Worker
from recurrentgemma.benchmarks.paired import Measure

OFFICIAL_LONGEST_PREFILL = 8192
"""Its attention scores are T x T; 32768 would need 26 GB for one layer."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and repetitions of a comparison."""

    prefill_lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    decode_batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    new_tokens: int = 64
    train_length: int = 2048
    first_call_prompts: tuple[int, ...] = (200, 331, 467)
    """Lengths that nobody has seen before."""
    check_lengths: tuple[int, ...] = (600, 1500)
    """Lengths at which logits are compared, within and beyond the window."""
    rounds: int = 5
    rounds_of_long_prefill: int = 2
    long_prefill: int = 32768

    @property
    def compile_length(self) -> int:
        """The prefill whose compilation is timed."""
        return min(max(self.prefill_lengths), OFFICIAL_LONGEST_PREFILL)


def measures(plan: Plan) -> list[Measure]:
    """Every line of the comparison but compilation, cheap ones first."""
    return [
        *(_decode(plan, batch) for batch in plan.decode_batches),
        *(_prefill(plan, length) for length in plan.prefill_lengths),
        _first_call(plan),
        _train(plan),
    ]


def _prefill(plan: Plan, length: int) -> Measure:
    def sample(worker: Worker, _: int) -> float:
        return length / worker.ask("prefill", length=length)["seconds"]

    long = length >= plan.long_prefill
    return Measure(
        f"prefill {length}",
        "tokens/s",
        higher_is_better=True,
        sample=sample,
        rounds=plan.rounds_of_long_prefill if long else plan.rounds,
        warm_up=not long,  # a shorter one has warmed up what does not compile
        leave_out=("official",) if length > OFFICIAL_LONGEST_PREFILL else (),
    )


def _decode(plan: Plan, batch: int) -> Measure:
    def seconds(worker: Worker, new_tokens: int) -> float:
        reply = worker.ask(
            "generate", batch=batch, prompt=plan.prompt, new_tokens=new_tokens
        )
        return reply["seconds"]

    def sample(worker: Worker, _: int) -> float:
        # The difference is decode alone: the prompt and all fixed costs cancel.
        difference = seconds(worker, 1 + plan.new_tokens) - seconds(worker, 1)
        return batch * plan.new_tokens / difference

    return Measure(
        f"decode, batch {batch}",
        "tokens/s",
        higher_is_better=True,
        sample=sample,
        rounds=plan.rounds,
    )


def _first_call(plan: Plan) -> Measure:
    def sample(worker: Worker, index: int) -> float:
        prompt = plan.first_call_prompts[index]
        reply = worker.ask("generate", batch=1, prompt=prompt, new_tokens=1)
        return reply["seconds"]

    return Measure(
        "first call, new prompt length",
        "s",
        higher_is_better=False,
        sample=sample,
        rounds=len(plan.first_call_prompts),
        warm_up=False,
    )


def _train(plan: Plan) -> Measure:
    def sample(worker: Worker, _: int) -> float:
        reply = worker.ask("train", length=plan.train_length)
        return plan.train_length / reply["seconds"]

    return Measure(
        f"train step {plan.train_length}",
        "tokens/s",
        higher_is_better=True,
        sample=sample,
        rounds=plan.rounds,
    )


def compilation(plan: Plan) -> Measure:
    """What the first prefill and the first generation take beyond the second.

    It must be the first thing that a worker is asked of these shapes; it happens once.
    """

    def work(worker: Worker) -> float:
        forward = worker.ask("prefill", length=plan.compile_length)
        decode = worker.ask(
            "generate", batch=1, prompt=plan.prompt, new_tokens=1 + plan.new_tokens
        )
        return forward["seconds"] + decode["seconds"]

    def sample(worker: Worker, _: int) -> float:
        return work(worker) - work(worker)

    return Measure(
        "compile forward and decode",
        "s",
        higher_is_better=False,
        sample=sample,
        rounds=1,
        warm_up=False,
        leave_out=("transformers",),
    )
