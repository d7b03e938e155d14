"""The training loop: from a config to a saved model, resumable at any step.

    recurrentgemma train --output runs/nano

The defaults are those of the bundled model.

An output directory holds `train_config.json`, `data.json`, what `watch.py` records, `checkpoints/`
(training states) and, when the run is done, `model/` (what `load` reads). The same call
with the same config resumes from the newest checkpoint, however the run ended, and ends
with the same parameters, bit for bit, as a run that was never interrupted.
"""

import contextlib
import math
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from recurrentgemma import cost
from recurrentgemma._atomic import LockedError, lock
from recurrentgemma.checkpoints import named_parameters, parameter_dtype, save
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.griffin import Griffin, unstack_layers
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training import sharding
from recurrentgemma.training.config import TrainConfig, claim
from recurrentgemma.training.data import Mixture, check_unchanged, open_data
from recurrentgemma.training.guard import SKIP, guarded
from recurrentgemma.training.optimizer import learning_rate_schedule, make_optimizer
from recurrentgemma.training.rows import init_rows
from recurrentgemma.training.selection import split_parameters
from recurrentgemma.training.start import (
    STATES,
    architecture_of,
    branch,
    check,
    first_model,
    frozen_in_compute_dtype,
    tokenizer_of,
)
from recurrentgemma.training.state import (
    Checkpoints,
    Parameters,
    TrainState,
    new_state,
    with_parameters,
)
from recurrentgemma.training.step import (
    add_up,
    loss_by_position,
    make_evaluation_step,
    make_train_step,
    mean_metrics,
)
from recurrentgemma.training.watch import METRICS, Watch, product_flops_per_s

DATA_RECORD = "data.json"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def train(config: TrainConfig) -> Path:
    """Trains, or goes on training, and saves the model.

    Returns:
      The directory of the trained model, for `recurrentgemma.load`.

    Raises:
      ValueError: the config does not fit the data, the tokenizer or the run that the
          output directory already holds; or a step must not count and `guard` says
          stop.
      OSError: something could not be written; what was saved before is as it was.
      KeyboardInterrupt: interrupted (Ctrl-C, SIGTERM); the state has been saved.
    """
    config.devices.join()
    mesh = config.devices.make()
    sharding.check_batch(mesh, config.data.batch_size, config.data.sequence_length)
    output = Path(config.output)
    architecture = architecture_of(config)
    tokenizer = tokenizer_of(config, architecture)
    check(config, architecture)
    training, held_out = open_data(config.data, tokenizer, config.seed)
    with _records(output, config, architecture, training) as folder:
        with sharding.made_on_host(mesh):
            model = first_model(config, architecture)
            run = _prepare(config, model, mesh, tokenizer)
        try:
            params = _run(run, training, held_out, folder)
        finally:
            run.checkpoints.close()
        if _is_first():
            model = unstack_layers(with_parameters(run.model, params))
            model = config.adapters.finish(output, model)
            save(output / "model", export(model, named_parameters(model)), tokenizer)
    return output / "model"


class _Run(NamedTuple):
    """What a run has besides its data."""

    config: TrainConfig
    model: Griffin
    """Shapes; how it runs is used."""
    tokenizer: Tokenizer
    mesh: Mesh | None
    optimizer: Any
    state: TrainState
    frozen: Parameters
    checkpoints: Checkpoints


def _prepare(
    config: TrainConfig, model: Griffin, mesh: Mesh | None, tokenizer: Tokenizer
) -> _Run:
    """The state to go on from: the newest, that of the run it branches off, or a new
    one."""
    optimizer = guarded(
        make_optimizer(config.optimizer, config.steps, model.config), config.guard
    )
    params, frozen = split_parameters(
        named_parameters(model),
        config.adapters.trained(config.train_only),
        config.freeze,
    )
    frozen = frozen_in_compute_dtype(frozen, model)
    carried = init_rows(config.rows, model, config.data.batch_size)
    # Its parameters are those of the state, which the first step uses up.
    model = jax.eval_shape(lambda: model)
    state = new_state(params, optimizer, carried)
    state, frozen = sharding.place((state, frozen), mesh)
    checkpoints = Checkpoints(
        Path(config.output) / STATES,
        keep=config.keep_checkpoints,
        keep_every=config.keep_every,
    )
    if checkpoints.latest_step is not None:
        state = checkpoints.restore(state)
    elif config.branch_from is not None:
        state = branch(config.branch_from, state)
        # The other run may go on, and lose this state.
        checkpoints.save(state)
    return _Run(config, model, tokenizer, mesh, optimizer, state, frozen, checkpoints)


def _run(
    run: _Run, data: Mixture, evaluation: Mixture | None, folder: Path
) -> Mapping[str, Any]:
    """Trains to the end; returns all parameters, whole. Records go to the folder."""
    config, frozen, state = run.config, run.frozen, run.state
    train_step = make_train_step(
        run.model,
        run.optimizer,
        learning_rate_schedule(config.optimizer, config.steps),
        rows=config.rows,
        seed=config.seed,
        accumulation=config.accumulation,
        z_weight=config.z_loss,
    )
    evaluation_step = make_evaluation_step(run.model)
    step, skipped = int(state.step), 0
    batch = data.batch(step)
    with _watch(run, step, folder) as watch, _interruption() as interrupted:
        while step < config.steps:
            started = time.perf_counter()
            placed = sharding.place_batch(batch, state.step)
            with sharding.on(run.mesh):
                state, metrics = train_step(state, frozen, placed)
            step += 1
            last = step == config.steps
            # While the devices work.
            if not last:
                batch = data.batch(step)
            row: dict[str, Any] = {"step": step}
            row |= {name: float(value) for name, value in metrics.items()}
            seconds = time.perf_counter() - started
            if evaluation and (last or step % config.evaluate_every == 0):
                batches = evaluation.batches(
                    config.data.batch_size, config.evaluation_batches
                )
                placed = (sharding.place_batch(b, state.step) for b in batches)
                params = state.params | frozen
                with sharding.on(run.mesh):
                    row |= _evaluate(evaluation_step(params, b) for b in placed)
                model = with_parameters(run.model, sharding.whole(params))
                row |= watch.memories(model, step)
                watch.say(f"step {step}: held-out loss {row['held_out_loss']:.4f}")
            watch.step(row, seconds)
            skipped = _check_step(row, config, skipped, run.checkpoints, watch)
            if last or interrupted or step % config.checkpoint_every == 0:
                run.checkpoints.save(state)
            if interrupted:
                run.checkpoints.finish()
                raise KeyboardInterrupt(f"stopped after step {step}; state saved")
            every = config.watch.sample_every
            if every is not None and step % every == 0:
                model = export(run.model, sharding.whole(state.params | frozen))
                watch.sample(model, run.tokenizer, step)
        run.checkpoints.finish()
        watch.plot()
    return sharding.whole(state.params | frozen)


def _watch(run: _Run, step: int, folder: Path) -> Watch:
    config = run.config
    length = config.data.sequence_length
    tokens = config.data.batch_size * length
    flops = cost.train_flops_per_token(run.model.config, length)
    devices = next(iter(run.state.params.values())).sharding.num_devices
    return Watch(
        folder,
        config.watch,
        first_step=step,
        steps=config.steps,
        tokens_per_step=tokens,
        flops_per_step=tokens * flops,
        peak_flops_per_s=devices * product_flops_per_s(run.model.runtime.dtype.name),
    )


def _evaluate(batches: Iterator[Any]) -> dict[str, Any]:
    """Entries of a row, from the sums of each batch."""
    totals = add_up(batches)
    found = {name: float(value) for name, value in mean_metrics(totals).items()}
    return {
        **{f"held_out_{name}": value for name, value in found.items()},
        "held_out_loss_by_position": loss_by_position(totals),
    }


def _check_step(
    row: dict[str, Any],
    config: TrainConfig,
    skipped: int,
    checkpoints: Checkpoints,
    watch: Watch,
) -> int:
    """The number of steps in a row that did not count, this one included.

    Raises:
      ValueError: this one did not, and it is one too many.
    """
    finite = math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])
    if finite and not row.get("skipped"):
        return 0
    skipped += 1
    what = f"the loss at step {row['step']} is {row['loss']:.4g}"
    what += f" (gradient norm {row['gradient_norm']:.4g})"
    if config.guard.on_bad_step == SKIP and skipped <= config.guard.most_skips:
        watch.say(f"{what}; the step is skipped")
        return skipped
    checkpoints.finish()
    raise ValueError(
        f"{what}; the newest good state is that of step {checkpoints.latest_step}. Try "
        f"a lower learning rate, or --on-bad-step {SKIP}."
    )


def export(model: Griffin, params: Mapping[str, Any]) -> Griffin:
    """The model with these parameters, those in bfloat16 that `load` would put there,
    its layers not stacked."""
    runtime = Runtime(compute_dtype="bfloat16")
    converted = with_parameters(
        model,
        {
            name: value.astype(parameter_dtype(name, model.config, runtime))
            for name, value in params.items()
        },
    )
    return unstack_layers(converted)


def _is_first() -> bool:
    """Whether this process writes: of several, one does."""
    return jax.process_index() == 0


@contextlib.contextmanager
def _records(
    output: Path, config: TrainConfig, architecture: GriffinConfig, data: Mixture
) -> Iterator[Path]:
    """The directory for the records of the run, claimed for it.

    Raises:
      ValueError: it holds another run, or another process trains in it.
    """
    if not _is_first():
        with tempfile.TemporaryDirectory() as unread:
            yield Path(unread)
        return
    claim(output, config, architecture)
    with _only_process(output):
        check_unchanged(output / DATA_RECORD, data)
        yield output


@contextlib.contextmanager
def _only_process(output: Path) -> Iterator[None]:
    """Raises ValueError if another process trains in this directory."""
    with (output / METRICS).open("ab") as metrics:
        try:
            lock(metrics.fileno())
        except LockedError:
            raise ValueError(
                f"output: another process trains in {output}; wait for it, or choose "
                "another directory"
            ) from None
        yield


@contextlib.contextmanager
def _interruption() -> Iterator[list[int]]:
    """A list that is no longer empty once a stop signal came; a second stops at once."""
    received: list[int] = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    except ValueError:
        # Only the main thread may; elsewhere no signal arrives either.
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
