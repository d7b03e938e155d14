"""The training loop: from a config to a saved model, resumable at any step.

    recurrentgemma train --output runs/nano

The defaults are those of the bundled model.

An output directory holds `train_config.json`, `metrics.jsonl` (one object a line),
`checkpoints/` (training states) and, when the run is done, `model/` (what `load` reads).
The same call with the same config resumes from the newest checkpoint, and ends with the
same parameters, bit for bit, as a run that was never interrupted.
"""

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import tqdm
from absl import logging
from flax import nnx

from recurrentgemma.checkpoints import named_parameters, parameter_dtype, save
from recurrentgemma.checkpoints.parameters import check_tokenizer
from recurrentgemma.config import Runtime, find_preset
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training import sharding
from recurrentgemma.training.corpus import (
    PYTHON_STDLIB,
    Document,
    read_documents,
    split_held_out,
)
from recurrentgemma.training.data import PackedTokens, encode_document
from recurrentgemma.training.mesh import MeshConfig
from recurrentgemma.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
)
from recurrentgemma.training.options import nested_config, option
from recurrentgemma.training.state import (
    Checkpoints,
    TrainState,
    with_parameters,
)
from recurrentgemma.training.step import (
    make_evaluation_step,
    make_train_step,
    means,
)

BUNDLED_TOKENIZER = Path(__file__).parents[1] / "assets" / "nano" / "tokenizer.model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run.

    Raises:
        ValueError: a value is outside its range.
    """

    output: str = option("directory of the run")
    model: str = option(
        "name of a preset, trained from random parameters", default="nano"
    )
    data: str = option(
        f"{PYTHON_STDLIB} (the Python files of the standard library), a directory or a "
        "file",
        default=PYTHON_STDLIB,
    )
    tokenizer: str | None = option(
        "path of a SentencePiece model, instead of the bundled one", default=None
    )
    steps: int = option("number of updates of the parameters", default=2500)
    batch_size: int = option("rows of a step", default=4)
    sequence_length: int = option("tokens of a row", default=512)
    seed: int = option(
        "seed of the initial parameters, the order of rows and the places of cuts",
        default=0,
    )
    held_out_share: float = option(
        "share of the documents that is kept for evaluation, about; 0 evaluates never",
        default=0.05,
    )
    evaluate_every: int = option(
        "steps between evaluations on held-out rows", default=250
    )
    evaluation_batches: int = option("batches that an evaluation reads", default=24)
    checkpoint_every: int = option("steps between saved training states", default=100)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    devices: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Where it runs; another call may resume it elsewhere."""

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "sequence_length",
            "evaluate_every",
            "evaluation_batches",
            "checkpoint_every",
        ):
            if not getattr(self, name) >= 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if not 0 <= self.held_out_share < 1:
            raise ValueError(
                f"held_out_share must be in [0, 1), got {self.held_out_share}"
            )


def train(config: TrainConfig) -> Path:
    """Trains, or goes on training, and saves the model.

    Returns:
        The directory of the trained model, for `recurrentgemma.load`.

    Raises:
        ValueError: the config does not fit the data, the tokenizer or the run that the
            output directory already holds.
        OSError: nothing could be written; what was saved before is as it was.
        KeyboardInterrupt: interrupted; the state has been saved.
    """
    config.devices.join()
    mesh = config.devices.make()
    sharding.check_batch(mesh, config.batch_size, config.sequence_length)
    output = Path(config.output)
    model_config = find_preset(config.model)
    tokenizer = Tokenizer(config.tokenizer or BUNDLED_TOKENIZER)
    check_tokenizer(model_config, tokenizer)
    training, held_out = split_held_out(
        read_documents(config.data), config.held_out_share
    )
    if config.held_out_share and not held_out:
        logging.warning(
            "data: none of the %d documents is held out, so the run has no held-out "
            "loss. Give more files or a larger held_out_share.",
            len(training),
        )
    if jax.process_index() == 0:
        _claim(output, config)

    optimizer = make_optimizer(config.optimizer, config.steps, model_config)
    with sharding.made_on_host(mesh):
        model = Griffin(model_config, rngs=nnx.Rngs(config.seed))
        params = named_parameters(model)
        state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    state = sharding.place(state, mesh)
    checkpoints = Checkpoints(output / "checkpoints")
    if checkpoints.latest_step is not None:
        state = checkpoints.restore(state)
    # The state is used up by the first step, so the template may not share its arrays.
    model = jax.eval_shape(lambda: model)

    packed = _pack(training, tokenizer, config, cut_seed=config.seed)
    evaluation = _pack(held_out, tokenizer, config) if held_out else None
    try:
        with sharding.on(mesh):
            state = _run(
                config, model, optimizer, state, checkpoints, packed, evaluation
            )
    finally:
        checkpoints.close()
    params = state.params if mesh is None else sharding.on_host(state.params)
    if jax.process_index() == 0:
        save(output / "model", export(model, params), tokenizer)
    return output / "model"


def _run(config, model, optimizer, state, checkpoints, packed, evaluation):
    learning_rate = learning_rate_schedule(config.optimizer, config.steps)
    train_step = make_train_step(model, optimizer, learning_rate)
    evaluation_step = make_evaluation_step(model)
    step = int(state.step)
    is_first = jax.process_index() == 0  # Of several processes one writes.
    path = Path(config.output) / "metrics.jsonl" if is_first else Path(os.devnull)
    log = MetricsLog(path, first_step=step)
    bar = tqdm.tqdm(total=config.steps, initial=step, desc="train", unit="step")
    with log, bar, _interruption() as interrupted:
        while step < config.steps:
            started = time.perf_counter()
            batch = packed.shuffled_batch(step, config.batch_size, config.seed)
            state, metrics = train_step(
                state, {}, sharding.place_batch(batch, state.step)
            )
            metrics = {name: float(value) for name, value in metrics.items()}
            seconds = time.perf_counter() - started
            step += 1
            row = {
                "step": step,
                **metrics,
                "train_tokens_per_s": batch.tokens.size / seconds,
            }
            last = step == config.steps
            if evaluation and (last or step % config.evaluate_every == 0):
                batches = evaluation.batches(
                    config.batch_size, config.evaluation_batches
                )
                placed = (sharding.place_batch(b, state.step) for b in batches)
                held_out = means(evaluation_step(state.params, b) for b in placed)
                row |= {f"held_out_{name}": held_out[name] for name in held_out}
                bar.write(f"step {step}: held-out loss {row['held_out_loss']:.4f}")
            log.write(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            bar.update()
            if not math.isfinite(row["loss"]):
                raise ValueError(
                    f"the loss at step {step} is {row['loss']}; the newest good state is that "
                    f"of step {checkpoints.latest_step}. Try a lower learning rate."
                )
            if last or interrupted or step % config.checkpoint_every == 0:
                checkpoints.save(state)
            if interrupted:
                raise KeyboardInterrupt(f"stopped after step {step}; state saved")
    return state


def export(model: Griffin, params: Mapping[str, Any]) -> Griffin:
    """The model with these parameters, those in bfloat16 that `load` would put there."""
    runtime = Runtime(compute_dtype="bfloat16")
    return with_parameters(
        model,
        {
            name: value.astype(parameter_dtype(name, model.config, runtime))
            for name, value in params.items()
        },
    )


class MetricsLog:
    """A JSON object a line; lines of steps that are about to be done again go.

    Args:
        path: the file; its directory exists.
        first_step: steps done so far.
    """

    def __init__(self, path: Path, first_step: int):
        kept = []
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A line that an interruption cut short has no newline.
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= first_step]
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _pack(
    documents: list[Document],
    tokenizer: Tokenizer,
    config: TrainConfig,
    cut_seed: int | None = None,
) -> PackedTokens:
    ids = (encode_document(tokenizer, d, cut_seed=cut_seed) for d in documents)
    return PackedTokens(ids, config.sequence_length)


def _claim(output: Path, config: TrainConfig) -> None:
    """Records the config of a new run; refuses to go on with another run's."""
    path = output / "train_config.json"
    fields = dataclasses.asdict(config)
    # Where a run lies does not make it another one.
    del fields["output"], fields["devices"]
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        return
    stored = _with_defaults(json.loads(path.read_text(encoding="utf-8")), TrainConfig)
    del stored["devices"]
    differing = sorted(
        f"{name} is {stored.get(name)!r}, not {fields.get(name)!r}"
        for name in stored.keys() | fields.keys()
        if stored.get(name) != fields.get(name)
    )
    if differing:
        raise ValueError(
            f"output: {output} holds a run of another config ({'; '.join(differing)}); "
            "choose another directory, or the same config to resume"
        )


def _with_defaults(stored: dict[str, Any], kind: type) -> dict[str, Any]:
    """A recorded config, with the default of each field that was not there yet."""
    fields = dict(stored)
    for field in dataclasses.fields(kind):
        if nested := nested_config(field):
            fields[field.name] = _with_defaults(stored.get(field.name, {}), nested)
        elif field.default is not dataclasses.MISSING:
            fields.setdefault(field.name, field.default)
    return fields


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """A list that is no longer empty once Ctrl-C was pressed; twice stops at once."""
    pressed: list[int] = []

    def note(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:
        # Only the main thread may; elsewhere Ctrl-C does not arrive either.
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
