"""What a training run is: `TrainConfig`, and its record in the run's directory."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from recurrentgemma import _validation as check
from recurrentgemma._atomic import replace_file
from recurrentgemma.config import GriffinConfig
from recurrentgemma.training import options as fields_of
from recurrentgemma.training.adapters import AdapterConfig
from recurrentgemma.training.data import DataConfig, lift_record
from recurrentgemma.training.guard import GuardConfig
from recurrentgemma.training.mesh import MeshConfig
from recurrentgemma.training.mixture import CONTINUOUS
from recurrentgemma.training.optimizer import OptimizerConfig
from recurrentgemma.training.options import option
from recurrentgemma.training.rows import CARRIED, RowsConfig
from recurrentgemma.training.watch import WatchConfig

RECORD = "train_config.json"
ARCHITECTURE = "architecture"
"""The key of the record that holds the model's config, whatever `model` names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model runs while it is trained; parameters are float32 throughout."""

    compute_dtype: str | None = option(
        "dtype of matrix products and activations; none: the device's best (float32 on "
        "CPU, bfloat16 on TPU and newer GPUs)",
        default=None,
    )
    stack_layers: bool = option(
        "run the groups of the block pattern as one loop: compile time does not grow "
        "with depth; parameters are then named groups.0 ...",
        default=False,
    )
    remat: bool = option(
        "recompute each block (each group, if stacked) in the backward pass instead of "
        "keeping its activations",
        default=False,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run.

    Raises:
      ValueError: a value is outside its range.
    """

    output: str = option("directory of the run", may_change=True)
    model: str | GriffinConfig | None = option(
        "architecture: a preset, a config.json or a directory with one; what the "
        "checkpoint of --init-from has, if that is given (default: nano)",
        default=None,
    )
    init_from: str | None = option(
        "checkpoint whose parameters the run begins with, in any layout that `load` "
        "reads; none: random ones",
        default=None,
    )
    branch_from: str | None = option(
        "run whose training state this one begins with, as RUN or RUN@STEP: parameters, "
        "moments and step; for a cool-down, with --schedule wsd",
        default=None,
    )
    train_only: tuple[str, ...] = option(
        "patterns of the names of parameters that are trained, such as "
        "blocks.*.mixer.*; all, if none is given",
        default=(),
    )
    freeze: tuple[str, ...] = option(
        "patterns of the names of parameters that are not trained", default=()
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Sources and batches."""
    tokenizer: str | None = option(
        "path of a SentencePiece model, instead of the checkpoint's or the bundled one",
        default=None,
    )
    steps: int = option("number of updates of the parameters", default=2500)
    accumulation: int = option(
        "parts that a step's rows are read in, one after the other, to save memory",
        default=1,
    )
    seed: int = option(
        "seed of the initial parameters, the order of rows and the places of cuts",
        default=0,
    )
    z_loss: float = option(
        "weight of the squared log of the softmax's normaliser (1e-4 in PaLM)",
        default=0.0,
    )
    evaluate_every: int = option(
        "steps between evaluations on held-out rows", default=250, may_change=True
    )
    evaluation_batches: int = option(
        "batches that an evaluation reads", default=24, may_change=True
    )
    checkpoint_every: int = option(
        "steps between saved training states", default=100, may_change=True
    )
    keep_checkpoints: int = option(
        "number of newest training states that are kept", default=2, may_change=True
    )
    keep_every: int | None = option(
        "training states of multiples of so many steps are kept for ever",
        default=None,
        may_change=True,
    )
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    adapters: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    """Adapters that are trained in the place of the parameters."""
    rows: RowsConfig = dataclasses.field(default_factory=RowsConfig)
    """What rows begin with, and whether they are read in chunks."""
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    """How the model runs."""
    devices: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Where the run lies; another call may resume it elsewhere."""
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """What happens at a loss that is not finite, or jumps."""
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    """What is shown and recorded."""

    def __post_init__(self):
        for name in (
            "steps",
            "accumulation",
            "evaluate_every",
            "evaluation_batches",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            check.positive_integer(name, getattr(self, name))
        if self.keep_every is not None:
            check.positive_integer("keep_every", self.keep_every)
        check.number("z_loss", self.z_loss, least=0)
        if self.rows.initial_state == CARRIED and self.data.order != CONTINUOUS:
            raise ValueError(
                f"order: expected {CONTINUOUS} with initial_state {CARRIED}, which goes "
                f"on where the row of the step before ended, got {self.data.order}"
            )
        if self.data.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation: expected a divisor of batch_size "
                f"{self.data.batch_size}, got {self.accumulation}"
            )


def read_record(path: str | Path) -> dict[str, Any]:
    """The fields of a `train_config.json`, as keyword arguments of `TrainConfig`.

    A record from before a field existed lacks it; `output` and what is derived are not
    in it.

    Raises:
      ValueError: the file cannot be read, or is no such record.
    """
    try:
        stored = lift_record(dict(json.loads(Path(path).read_text(encoding="utf-8"))))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"config: expected the record of a run in {path}: {error}"
        ) from error
    stored.pop(ARCHITECTURE, None)
    if isinstance(stored.get("model"), dict):
        stored["model"] = GriffinConfig.from_dict(stored["model"])
    try:
        config = fields_of.from_dict(TrainConfig, stored | {"output": ""})
    except ValueError as error:
        raise ValueError(f"config: {path}: {error}") from error
    return {name: getattr(config, name) for name in stored}


def claim(output: Path, config: TrainConfig, architecture: GriffinConfig) -> None:
    """Records the config of a new run; refuses to go on with another run's.

    What may change, such as the steps between evaluations, is recorded anew.
    """
    path = output / RECORD
    fields = fields_of.to_dict(config) | {ARCHITECTURE: architecture.to_dict()}
    del fields["output"]
    if path.exists():
        _compare(output, json.loads(path.read_text(encoding="utf-8")), fields)
    output.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _compare(output: Path, stored: dict[str, Any], fields: dict[str, Any]) -> None:
    stored = fields_of.with_defaults(lift_record(stored), TrainConfig)
    fields = dict(fields)
    if ARCHITECTURE in stored:
        # The same architecture may have got another name.
        fields["model"] = stored["model"]
    else:
        # A record from before there was one names a preset.
        fields.pop(ARCHITECTURE)
        fields["model"] = fields["model"] or "nano"
    differing = fields_of.differences(stored, fields, TrainConfig)
    if differing:
        raise ValueError(
            f"output: {output} holds a run of another config ({'; '.join(differing)}); "
            "choose another directory, or the same config to resume"
        )
