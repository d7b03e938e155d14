"""The experiments: a task, three models of one size, and how they are trained.

`small` takes minutes on a CPU; `paper` has the sizes of the Griffin paper (section 6.2
and appendix H) and of Zoology (arXiv 2312.04927, section 4). The Griffin paper gives
neither learning rate, batch, number of steps nor the width of the RG-LRU: they are
chosen here (a sweep; 64 rows; E = D).
"""

import dataclasses
import math
from collections.abc import Mapping

from recurrentgemma.benchmarks.recall.tasks import (
    Copying,
    Induction,
    Mqar,
    PhoneBook,
    Task,
)
from recurrentgemma.benchmarks.recall.training import Plan
from recurrentgemma.config import GriffinConfig

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A task, the models, and what is asked of them."""

    task: Task
    """Task of training."""
    plan: Plan
    """Lengths, steps and batch of training."""
    models: dict[str, GriffinConfig]
    """Architecture by name."""
    tests: tuple[tuple[int, Task], ...]
    """Lengths and tasks of the evaluation."""


def _five_blocks(vocab_size: int, window: int) -> dict[str, GriffinConfig]:
    """5 blocks of width 64, 250K parameters; Griffin's only attention in block 3."""
    return _models(
        {
            "griffin": ("recurrent",) * 2 + ("local_attention",) + ("recurrent",) * 2,
            "hawk": ("recurrent",),
            "mqa-transformer": ("global_attention",),
        },
        vocab_size=vocab_size,
        window=window,
        width=64,
        mlp_width=192,
        num_layers=5,
    )


def _two_mixers(vocab_size: int, window: int, width: int) -> dict[str, GriffinConfig]:
    """2 layers without an MLP, as in Zoology."""
    return _models(
        {
            "griffin": ("recurrent", "local_attention"),
            "hawk": ("recurrent",),
            "mqa-transformer": ("global_attention",),
        },
        vocab_size=vocab_size,
        window=window,
        width=width,
        mlp_width=0,
        num_layers=2,
    )


def _models(patterns, *, vocab_size, window, width, mlp_width, num_layers):
    return {
        name: GriffinConfig(
            vocab_size=vocab_size,
            width=width,
            mlp_width=mlp_width,
            num_layers=num_layers,
            block_pattern=pattern,
            num_heads=4,
            head_dim=width // 4,
            attention_window=window,
            lru_width=width,
            num_gate_blocks=4,
            embedding_scale=math.sqrt(width),
        )
        for name, pattern in patterns.items()
    }


def _lengths(task: Task, *lengths: int) -> tuple[tuple[int, Task], ...]:
    return tuple((length, task) for length in lengths)


def _mqar(vocab_size: int, steps: int, width: int, sizes, tests) -> Experiment:
    """Trained on (length, pairs) of `sizes` in turn, tested on `tests` too."""
    tasks = {length: Mqar(vocab_size, pairs) for length, pairs in sizes}
    return Experiment(
        task=ByLength(tasks),
        plan=Plan(lengths=tuple(tasks), steps=steps, batch_size=64),
        models=_two_mixers(vocab_size, window=64, width=width),
        tests=tuple((n, Mqar(vocab_size, pairs)) for n, pairs in (*sizes, *tests)),
    )


@dataclasses.dataclass(frozen=True)
class ByLength:
    """A task that is another one at each length."""

    tasks: Mapping[int, Task]

    @property
    def vocab_size(self) -> int:
        """The vocabulary of all of them."""
        return max(task.vocab_size for task in self.tasks.values())

    def sample(self, rng, batch_size, length):
        """Rows of the task of this length."""
        return self.tasks[length].sample(rng, batch_size, length)


EXPERIMENTS: dict[str, dict[str, Experiment]] = {
    "small": {
        "copying": Experiment(
            task=Copying(num_data=8),
            plan=Plan(lengths=(64,), steps=1500, batch_size=32),
            models=_five_blocks(16, window=32),
            tests=_lengths(Copying(num_data=8), 64, 128, 256, 512, 1024),
        ),
        "induction": Experiment(
            task=Induction(),
            plan=Plan(lengths=(64,), steps=1500, batch_size=32),
            models=_five_blocks(16, window=32),
            tests=_lengths(Induction(), 64, 128, 256, 512, 1024, 2048, 4096),
        ),
        "mqar": _mqar(
            512, 1500, 64, ((64, 4), (128, 8)), ((256, 16), (256, 32), (512, 64))
        ),
        "phone_book": Experiment(
            task=PhoneBook(),
            plan=Plan(lengths=(4, 8), steps=1500, batch_size=32),
            models=_five_blocks(PhoneBook.vocab_size, window=48),
            tests=_lengths(PhoneBook(), 4, 8, 16, 32, 64),
        ),
    },
    "paper": {
        "copying": Experiment(
            task=Copying(),
            plan=Plan(lengths=(1024,), steps=50_000, batch_size=64),
            models=_five_blocks(16, window=512),
            tests=_lengths(Copying(), 1024, 2048, 4096),
        ),
        "induction": Experiment(
            task=Induction(),
            plan=Plan(lengths=(256,), steps=50_000, batch_size=64),
            models=_five_blocks(16, window=128),
            tests=_lengths(Induction(), *(256 * 2**i for i in range(7))),
        ),
        "mqar": _mqar(
            8192,
            50_000,
            128,
            ((64, 4), (128, 8), (256, 16)),
            ((256, 32), (512, 64), (512, 128), (1024, 256)),
        ),
        "phone_book": Experiment(
            task=PhoneBook(vocab_size=1024),
            plan=Plan(lengths=(8, 16, 32), steps=50_000, batch_size=64),
            models=_five_blocks(1024, window=256),
            tests=_lengths(PhoneBook(vocab_size=1024), 8, 16, 32, 64, 128, 256),
        ),
    },
}
