"""Hidden states after every layer: ours, and those of the packages that others use.

transformers and the official package run in a process of their own, in this Python
environment or in another one, on the checkpoint itself if it has their layout and else
on a conversion of it. Every state has a name: "embedding" (scaled), "layer 0" and so
on (the residual stream after the block), "final norm", "logits".
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma.checkpoints import Checkpoint, convert
from recurrentgemma.chunk import Chunk
from recurrentgemma.griffin import Griffin
from recurrentgemma.rotary import rotary_tables

NOT_INHERITED = ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
"""What would show the process this package, or change what it computes."""
LAST_LINES = 3
"""Of what a process that failed has written, for the message."""


class Reference(NamedTuple):
    """Another package that computes the same model."""

    script: str
    layout: str
    """The checkpoint layout that it reads, a name in `FORMATS`."""
    modules: tuple[str, ...]
    """What this environment must have for it; none if it cannot be in it."""


REFERENCES = {
    "transformers": Reference(
        "reference_transformers.py", "hugging_face", ("transformers", "torch")
    ),
    # Its import name is that of this package.
    "official": Reference("reference_official.py", "official_flax", ()),
}


def find_python(name: str, given: str | None) -> str | None:
    """The Python to run a reference with, or None if there is none.

    Args:
      name: a name in `REFERENCES`.
      given: the path of an interpreter; None looks in this environment.

    Raises:
      ValueError: the path is not of a file.
    """
    if given is not None:
        if not Path(given).is_file():
            raise ValueError(f"{given} is not a Python interpreter.")
        return str(Path(given).absolute())
    modules = REFERENCES[name].modules
    found = modules and all(importlib.util.find_spec(module) for module in modules)
    return sys.executable if found else None


def layer_states(model: Griffin, tokens: Sequence[int]) -> dict[str, np.ndarray]:
    """Our states of a text from its start.

    Args:
      model: not stacked.
      tokens: [T].

    Returns:
      float32 [T, D] by name, in order; "logits" are [T, V].
    """
    states = _run_layers(model, np.asarray([tokens], np.int32))
    layers = [f"layer {i}" for i in range(len(states) - 3)]
    names = ["embedding", *layers, "final norm", "logits"]
    return {
        name: np.asarray(state[0], np.float32)
        for name, state in zip(names, states, strict=True)
    }


@jax.jit
def _run_layers(model: Griffin, tokens: jax.Array) -> list[jax.Array]:
    config = model.config
    length = jnp.full((1,), tokens.shape[1], jnp.int32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    rotary = rotary_tables(positions, round(config.rope_fraction * config.head_dim))
    chunk = Chunk(positions, length, length, rotary)
    states = [model.embedder.encode(tokens, model.runtime.dtype)]
    for block in model.blocks:
        x, _ = block(states[-1], chunk, None)
        states.append(x)
    x = model.final_norm(states[-1])
    return [*states, x, model.logits(x)]


def reference_states(
    name: str,
    python: str,
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    dtype: str,
    folder: Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The states as another package computes them.

    Args:
      name: a name in `REFERENCES`.
      python: its interpreter.
      checkpoint: the weights.
      tokens: [T], at most W of them: transformers shows W keys instead of W + 1.
      dtype: what it computes in.
      folder: empty, for files; perhaps as large as the checkpoint.

    Returns:
      float32 [T, ...] by name, and versions by package.

    Raises:
      ValueError: its layout cannot hold this model.
      RuntimeError: it failed; the message has the last lines that it wrote.
    """
    reference = REFERENCES[name]
    path = checkpoint.path
    if checkpoint.layout != reference.layout:
        path = folder / reference.layout
        config = checkpoint.config
        convert(checkpoint.path, path, format=reference.layout, config=config)
    request, output = folder / "request.json", folder / "states.npz"
    content = {
        "checkpoint": str(path.absolute()),
        "config": checkpoint.config.to_dict(),
        "tokens": [int(token) for token in tokens],
        "dtype": dtype,
        "output": str(output.absolute()),
    }
    request.write_text(json.dumps(content))
    script = Path(__file__).with_name(reference.script)
    environment = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    environment |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    # In another folder: in this repository's root its imports would find this package.
    done = subprocess.run(
        [python, "-P", str(script), str(request.absolute())],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        last = " / ".join(lines[-LAST_LINES:]) or "nothing"
        raise RuntimeError(
            f"{name} failed with {done.returncode}; the last that it wrote: {last}"
        )
    with np.load(output) as arrays:
        states = dict(arrays)
    return states, json.loads(str(states.pop("versions")))
