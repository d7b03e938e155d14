"""One random checkpoint, written in the layout of each opponent.

directory/config.json         the config, as `GriffinConfig.to_dict`
directory/tokens.npy          int32 [batch, length]
directory/official_flax/      what the official package reads: RecurrentGemma alone
directory/hugging_face/       what transformers reads
"""

import json
from pathlib import Path

import numpy as np

from recurrentgemma.cache import grows
from recurrentgemma.checkpoints import FORMATS
from recurrentgemma.checkpoints.parameters import parameter_shapes
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.config import GriffinConfig

NUM_TOKENS = (8, 32768)
FIRST_ORDINARY_TOKEN = 3  # after padding, end and beginning of text
EMBEDDING_SCALE = 0.2
"""Share of the usual spread: at 1 a random model with tied embeddings repeats its input."""


def random_tensors(config: GriffinConfig, seed: int = 0) -> dict[str, TensorSource]:
    """Random float32 parameters; nothing is zero, so that a swap would show."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("a_param"):  # a ** 8 uniform in area on [0.9, 0.999]
            radius = np.sqrt(rng.uniform(0.9**2, 0.999**2, shape))
            return np.log(np.expm1(-np.log(radius))).astype(np.float32)
        scale = 0.1
        if name.endswith("embedding"):
            scale = EMBEDDING_SCALE * config.width**-0.5
        elif name.endswith("kernel"):
            scale = shape[-2] ** -0.5
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    def source(array: np.ndarray) -> TensorSource:
        return TensorSource(array.shape, array.dtype, 0, lambda i, j: array[i:j])

    shapes = parameter_shapes(config)
    return {name: source(draw(name, shape)) for name, shape in shapes.items()}


def write(directory: Path, config: GriffinConfig, seed: int = 0) -> None:
    """Writes weights and tokens for every opponent.

    Args:
      directory: Exists and is empty.
      config: A model that transformers has: Gemma 1 or 2, or one that the official
        package has too, RecurrentGemma's blocks R R A with a gate block a head, the
        embedding scaled by the bfloat16-rounded square root.
      seed: Of the random numbers.
    """
    tensors = random_tensors(config, seed)
    layouts = ["hugging_face"]
    if not grows(config):
        layouts.append("official_flax")
    for layout in layouts:
        folder = directory / layout
        folder.mkdir()
        FORMATS[layout].write(folder, config, tensors, None)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    rng = np.random.default_rng(seed + 1)
    tokens = rng.integers(FIRST_ORDINARY_TOKEN, config.vocab_size, NUM_TOKENS)
    np.save(directory / "tokens.npy", tokens.astype(np.int32))
