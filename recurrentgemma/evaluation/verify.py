"""A certificate that a checkpoint is what it should be, without showing its weights.

Somebody who has weights that nobody else may see runs this, and others read the result:
which preset it is, a digest of the weights, what the model says to fixed prompts, how
well it reads a fixed text, and how far it is from other packages, layer by layer.
Nothing is drawn at random: on one machine a checkpoint has one certificate.
"""

import importlib.metadata
import importlib.resources
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from recurrentgemma import __version__
from recurrentgemma.checkpoints import Checkpoint, load, open_checkpoint
from recurrentgemma.config import GriffinConfig, Runtime
from recurrentgemma.evaluation.checks import (
    NEW_TOKENS,
    PROMPTS,
    Check,
    check_architecture,
    check_generation,
    check_layers,
    check_splits,
    check_text,
    check_weights,
)
from recurrentgemma.evaluation.layer_states import (
    REFERENCES,
    find_python,
    layer_states,
    reference_states,
)
from recurrentgemma.evaluation.reader import PIECE_TOKENS, Reader

CERTIFICATE_VERSION = 1
COMPARED_TOKENS = 256
"""The most that other packages are asked to read."""


class Tolerances(NamedTuple):
    """Of relative RMS differences, and of log-probabilities in nats."""

    split: float
    log_prob: float
    layer: float


TOLERANCES = {
    # Sums in another order, through all layers. Between packages sqrt(1 - a^2) is
    # computed in different ways, which near a = 1 cancels three of seven digits.
    "float32": Tolerances(split=1e-4, log_prob=1e-3, layer=1e-3),
    # 8 bits: a last bit that differs is 4e-3, and every layer adds some.
    "bfloat16": Tolerances(split=5e-2, log_prob=0.5, layer=5e-2),
}

Report = Callable[[str], None]


def verify(
    path_or_preset: str | os.PathLike[str],
    *,
    config: GriffinConfig | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    pythons: Mapping[str, str | None] | None = None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Makes the certificate of a checkpoint.

    Args:
      path_or_preset: as for `load`.
      config: as for `load`.
      tokenizer: as for `load`; needed if the checkpoint has none.
      dtype: what everybody computes in, a key of `TOLERANCES`. bfloat16 halves the
        memory and shows less.
      pythons: interpreters of environments that have the other packages, by name in
        `REFERENCES`; those not given are looked for in this one.
      report: called with a line of text when something begins and when it has ended.

    Returns:
      The certificate, plain JSON values: "passed" tells whether no check failed.

    Raises:
      ValueError: as for `load`; there is no tokenizer; an interpreter does not exist.
    """
    given = pythons or {}
    found = {name: find_python(name, given.get(name)) for name in REFERENCES}
    checkpoint = open_checkpoint(path_or_preset, config)
    # Full float32 products, also where a faster kind is the default.
    with jax.default_matmul_precision("highest"):
        checks, tokens, states = _own_checks(
            checkpoint, tokenizer, dtype, any(found.values()), report
        )
    # The model is gone: two copies of the weights are never in memory.
    for name, python in found.items():
        if python is not None:
            report(f"{name}: reading {len(tokens)} tokens with {python}")
        asked = given.get(name) is not None
        check = _check_reference(name, python, asked, checkpoint, tokens, states, dtype)
        checks.append(_reported(check, report))
    certificate = {
        "certificate_version": CERTIFICATE_VERSION,
        "passed": all(check.status != "failed" for check in checks),
        "versions": _versions(),
        "device": jax.devices()[0].device_kind,
        "dtype": dtype,
        "layout": checkpoint.layout,
        "config": checkpoint.config.to_dict(),
        "config_fingerprint": checkpoint.config.fingerprint(),
        "checks": {
            check.name: {
                "status": check.status,
                "message": check.message,
                **check.figures,
            }
            for check in checks
        },
    }
    return _plain(certificate)


def _own_checks(
    checkpoint: Checkpoint,
    tokenizer: str | os.PathLike[str] | None,
    dtype: str,
    compares: bool,
    report: Report,
) -> tuple[list[Check], list[int], dict[str, np.ndarray]]:
    """What needs nobody else; the compared tokens, and our states if asked for."""
    config, tolerances = checkpoint.config, TOLERANCES[dtype]
    report(f"loading ({checkpoint.layout}, {dtype})")
    runtime = Runtime(compute_dtype=dtype)
    model, chosen = load(
        checkpoint.path, config=config, tokenizer=tokenizer, runtime=runtime
    )
    if chosen is None:
        raise ValueError(
            f"{checkpoint.path} has no tokenizer, which the prompts need: pass one "
            "(--tokenizer PATH)."
        )
    text = _bundled_text()
    ids = chosen.encode(text)
    local = "local_attention" in config.block_types
    window = config.attention_window if local else PIECE_TOKENS
    repeated = np.resize(ids, window + PIECE_TOKENS).tolist()
    reader = Reader(model, capacity=max(len(ids), len(repeated)))
    checks = [_reported(check_architecture(checkpoint), report)]
    report("weights: reading all")
    checks.append(_reported(check_weights(checkpoint.stored.tensors), report))
    report(f"generation: {len(PROMPTS)} prompts, {NEW_TOKENS} tokens each")
    check = check_generation(reader, chosen, tolerances.log_prob)
    checks.append(_reported(check, report))
    report(f"splits: {len(repeated)} tokens, whole and in pieces")
    checks.append(_reported(check_splits(reader, repeated, tolerances.split), report))
    report(f"text: {len(ids)} tokens")
    checks.append(_reported(check_text(reader, ids, text), report))
    compared = ids[: min(window, COMPARED_TOKENS)]
    states: dict[str, np.ndarray] = {}
    if compares:
        report(f"layers: {len(compared)} tokens")
        states = layer_states(model, compared)
    return checks, compared, states


def _check_reference(
    name: str,
    python: str | None,
    asked: bool,
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    ours: Mapping[str, np.ndarray],
    dtype: str,
) -> Check:
    if python is None:
        message = f"not installed here; --{name}-python names a Python that has it"
        return Check(name, "skipped", message, {})
    with tempfile.TemporaryDirectory() as folder:
        try:
            theirs, versions = reference_states(
                name, python, checkpoint, tokens, dtype, Path(folder)
            )
        except ValueError as error:  # It has no such model.
            return Check(name, "skipped", str(error), {})
        except RuntimeError as error:
            status = "failed" if asked else "skipped"
            return Check(name, status, str(error), {})
    check = check_layers(name, ours, theirs, TOLERANCES[dtype].layer)
    return check._replace(figures={"versions": versions, **check.figures})


def _bundled_text() -> str:
    assets = importlib.resources.files("recurrentgemma") / "assets"
    return (assets / "verify.txt").read_text(encoding="utf-8")


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "numpy")
    return {
        "recurrentgemma": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _plain(value: Any) -> Any:
    """The value in JSON, which has no number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _reported(check: Check, report: Report) -> Check:
    report(f"{check.name}: {check.status}: {check.message}")
    return check
