"""Runs that end by `kill -9`, each in a process of its own.

    python -m tests.training.killed_runs OUTPUT DATA --kills 20

trains in OUTPUT, killing the run at random moments so many times; then trains to the end
without, and again in OUTPUT-whole without any kill, and compares all parameters.

Processes are forked after everything is imported and before JAX has a backend, so that a
run costs its own work alone.
"""

import argparse
import dataclasses
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from recurrentgemma import load
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.training import records
from recurrentgemma.training.config import TrainConfig
from recurrentgemma.training.data import DataConfig
from recurrentgemma.training.loop import train
from recurrentgemma.training.state import Checkpoints
from tests.models import tiny_config

LONGEST_START_S = 300
TINY = tiny_config(vocab_size=4096, num_layers=1, width=16, lru_width=16)


def config_for(data: str, output: str, **fields) -> TrainConfig:
    """A short run of a tiny model; fields of the data's config stand beside the others."""
    defaults = {
        "output": output,
        "model": TINY,
        "steps": 6,
        "evaluate_every": 3,
        "evaluation_batches": 1,
        "checkpoint_every": 2,
    }
    of_data = {
        "data": data,
        "batch_size": 2,
        "sequence_length": 16,
        "held_out_share": 0.2,
    }
    names = {field.name for field in dataclasses.fields(DataConfig)}
    of_data |= {name: fields.pop(name) for name in names & fields.keys()}
    return TrainConfig(**{**defaults, **fields}, data=DataConfig(**of_data))


def forked(
    function: Callable[[], object], until: Callable[[], object] | None = None
) -> int:
    """Runs a function in a forked process; returns its exit status or -signal.

    The process is killed when `until` returns.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    if until is not None:
        until()
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_a_state_is_written(config: TrainConfig) -> None:
    """Trains until the second state is being saved by Orbax's threads."""
    save = Checkpoints.save

    def save_and_die(self, state):
        save(self, state)
        if int(state.step) == 2 * config.checkpoint_every:
            kill_this_process()

    Checkpoints.save = save_and_die
    train(config)


def killed_in_a_line_of_the_log(config: TrainConfig) -> None:
    """Trains until half of the row of the step before the last is written."""

    def half(self, row):
        if row["step"] == config.steps - 1:
            self._file.write(b'{"step": ')
            self._file.flush()
            kill_this_process()
        write(self, row)

    write, records.JsonLines.write = records.JsonLines.write, half
    train(config)


def parameters_of(output: str) -> dict[str, np.ndarray]:
    parameters = named_parameters(load(Path(output) / "model")[0])
    return {name: np.asarray(value) for name, value in parameters.items()}


def compare(output: str, other: str) -> None:
    """Exits unless two runs ended with the same bits."""
    ours, theirs = parameters_of(output), parameters_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), f"{name} differs"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("data")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--most-seconds", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def config(output):
        return config_for(
            arguments.data,
            output,
            steps=arguments.steps,
            evaluate_every=50,
            checkpoint_every=arguments.checkpoint_every,
        )

    moments = random.Random(arguments.seed)
    metrics = Path(arguments.output) / "metrics.jsonl"

    def rows():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    for kill in range(arguments.kills):
        # One in four may die before its first step.
        before, seconds = rows(), moments.uniform(0, arguments.most_seconds)

        def until(kill=kill, before=before, seconds=seconds):
            limit = time.monotonic() + LONGEST_START_S
            while kill % 4 and rows() <= before and time.monotonic() < limit:
                time.sleep(0.02)
            time.sleep(seconds)

        status = forked(lambda: train(config(arguments.output)), until)
        print(f"kill {kill + 1}: status {status}, {rows()} rows", flush=True)
        if status != -signal.SIGKILL:
            sys.exit("the run ended before it was killed; give it more steps")
    whole = f"{arguments.output}-whole"
    for output in (arguments.output, whole):
        if forked(lambda output=output: train(config(output))):
            sys.exit(f"{output} failed")
    compare(arguments.output, whole)
    print(
        f"{arguments.kills} kills in {arguments.steps} steps: every parameter is bit-equal"
    )


if __name__ == "__main__":
    main()
