"""What `verify` finds out about a checkpoint, one thing at a time."""

import collections
import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.checkpoints import Checkpoint
from recurrentgemma.checkpoints.parameters import presets_of
from recurrentgemma.checkpoints.tensors import TensorSource, blocks_of
from recurrentgemma.config import PRESETS, GriffinConfig
from recurrentgemma.evaluation.reader import Reader
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a fisherman who",
    "1, 2, 3, 4, 5, 6,",
    "def add(a, b):\n    ",
)
NEW_TOKENS = 16
SPLITS = (256, 1, 100, 3, 255, 17)
"""Sizes of the pieces, in turn, that must give what the whole gives."""


class Check(NamedTuple):
    """What was found out about one thing."""

    name: str
    status: str
    """"passed", "failed" or "skipped"."""
    message: str
    figures: dict[str, Any]


def check_architecture(checkpoint: Checkpoint) -> Check:
    """The preset that has these shapes, which then must be this config too."""
    tensors = checkpoint.stored.tensors
    dtypes = collections.Counter(source.dtype.name for source in tensors.values())
    figures: dict[str, Any] = {
        "preset": None,
        "tensors": len(tensors),
        "parameters": sum(math.prod(source.shape) for source in tensors.values()),
        "stored_dtypes": dict(sorted(dtypes.items())),
    }
    fields = _fields(checkpoint.config)
    differing: dict[str, dict[str, Any]] = {}
    for name in presets_of({n: source.shape for n, source in tensors.items()}):
        theirs = _fields(PRESETS[name])
        differing[name] = {k: v for k, v in theirs.items() if fields[k] != v}
    if not differing:
        message = "no preset has these shapes: a model of its own"
        return Check("architecture", "passed", message, figures)
    name = min(differing, key=lambda name: len(differing[name]))
    figures["preset"] = name
    if not differing[name]:
        message = f"{name}: {len(tensors)} tensors of its shapes, {_listed(dtypes)}"
        return Check("architecture", "passed", message, figures)
    figures["preset_says"] = differing[name]
    wrong = (f"{k} is {fields[k]!r}, not {v!r}" for k, v in differing[name].items())
    message = f"the shapes are those of {name}, but " + "; ".join(wrong)
    return Check("architecture", "failed", message, figures)


def _fields(config: GriffinConfig) -> dict[str, Any]:
    """Fields that mean the same are the same."""
    fields = config.to_dict()
    fields["block_pattern"] = list(config.block_types)
    return {**fields, "query_scale": config.attention_scale}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))


def check_weights(tensors: Mapping[str, TensorSource]) -> Check:
    """That all are finite, and their digest, which no layout changes.

    SHA-256 over the tensors in the order of their native names: a line with name, dtype
    and shape, then the values in native orientation.
    """
    digest, wrong = hashlib.sha256(), []
    for name in sorted(tensors):
        array = tensors[name].load()
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
        for block in blocks_of(array):
            digest.update(block)
        if not np.isfinite(array).all():
            wrong.append(name)
    figures = {"sha256": digest.hexdigest(), "not_finite": wrong}
    if wrong:
        return Check("weights", "failed", f"not finite: {', '.join(wrong)}", figures)
    return Check("weights", "passed", f"sha256 {digest.hexdigest()}", figures)


def check_generation(reader: Reader, tokenizer: Tokenizer, tolerance: float):
    """Greedy continuations, which the plain forward pass must find the same.

    Args:
      reader: of the model.
      tokenizer: encodes the prompts.
      tolerance: in nats.
    """
    sampler = Sampler(reader.model, tokenizer, compile_ahead=False)
    samples = sampler(
        PROMPTS,
        max_new_tokens=NEW_TOKENS,
        sampling=Sampling(temperature=0),
        end_tokens=[],
    )
    continuations, error, shortfall = [], 0.0, 0.0
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = [*sample.prompt_tokens, *sample.tokens]
        log_probs, below_best = reader.log_probs(ids)
        count = len(sample.tokens)
        difference = np.abs(log_probs[-count:] - sample.log_probs).max()
        # Not max(): it would lose a NaN.
        error = np.maximum(error, difference)
        shortfall = np.maximum(shortfall, below_best[-count:].max())
        continuation = {
            "prompt": prompt,
            "tokens": [int(token) for token in sample.tokens],
            "text": tokenizer.decode(sample.tokens),
            "log_probs": [round(float(value), 5) for value in sample.log_probs],
        }
        continuations.append(continuation)
    figures = {
        "largest_log_prob_difference": float(error),
        "largest_shortfall": float(shortfall),
        "tolerance": tolerance,
        "continuations": continuations,
    }
    passed = error <= tolerance and shortfall <= tolerance
    message = (
        f"{len(PROMPTS)} x {NEW_TOKENS} tokens; log-probabilities within {error:.1g} "
        f"of the forward pass, {shortfall:.1g} below its best"
    )
    return Check("generation", _status(passed), message, figures)


def check_splits(reader: Reader, ids: Sequence[int], tolerance: float) -> Check:
    """That a text in pieces gives the hidden states of the whole.

    Args:
      reader: of the model.
      ids: longer than the window.
      tolerance: of the relative RMS difference.
    """
    found = difference(reader.hidden(ids, SPLITS), reader.whole(ids))
    figures = {"tokens": len(ids), "splits": list(SPLITS), "tolerance": tolerance}
    message = f"{len(ids)} tokens: relative RMS {found['relative_rms']:.1g}"
    status = _status(found["relative_rms"] <= tolerance)
    return Check("splits", status, message, {**figures, **found})


def check_text(reader: Reader, ids: Sequence[int], text: str) -> Check:
    """Bits a byte of the bundled text, begin token given, end token not counted.

    Args:
      reader: of the model.
      ids: of the text.
      text: the text.
    """
    data = text.encode()
    nats = -float(reader.log_probs(ids)[0].astype(np.float64).sum())
    bits = nats / math.log(2) / len(data)
    limit = 8 * len(zlib.compress(data, 9)) / len(data)
    figures = {
        "bits_per_byte": bits,
        "nats_per_token": nats / (len(ids) - 1),
        "tokens": len(ids) - 1,
        "bytes": len(data),
        "text_sha256": hashlib.sha256(data).hexdigest(),
        "limit": limit,
    }
    message = f"{bits:.3f} bits a byte (at most {limit:.3f}, those of zlib)"
    return Check("text", _status(bits <= limit), message, figures)


def check_layers(
    name: str,
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    tolerance: float,
) -> Check:
    """That the states of every layer agree with those of another package.

    Args:
      name: of the package.
      ours: [T, ...] by name, in the order of the layers.
      theirs: the same.
      tolerance: of the relative RMS difference.
    """
    found = {state: difference(ours[state], theirs[state]) for state in ours}
    wrong = [s for s, d in found.items() if not d["relative_rms"] <= tolerance]
    figures = {"tokens": len(ours["logits"]), "tolerance": tolerance, "states": found}
    if wrong:
        message = (
            f"{len(wrong)} of {len(found)} states differ, first {wrong[0]}: relative "
            f"RMS {found[wrong[0]]['relative_rms']:.1g}"
        )
        return Check(name, "failed", message, figures)
    worst = max(found, key=lambda state: found[state]["relative_rms"])
    message = (
        f"{len(found)} states agree; relative RMS at most "
        f"{found[worst]['relative_rms']:.1g} ({worst})"
    )
    return Check(name, "passed", message, figures)


def difference(actual: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """RMS of the difference over that of `expected`, and the largest difference."""
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    error = actual - expected
    rms = math.sqrt(np.mean(np.square(expected))) or 1.0
    return {
        "relative_rms": math.sqrt(np.mean(np.square(error))) / rms,
        "max": float(np.abs(error).max()),
    }


def _status(passed: Any) -> str:
    return "passed" if passed else "failed"
