"""The model that comes with the package: its size, dtypes and whether it learnt."""

import json
import struct

import jax
import numpy as np

from recurrentgemma import PRESETS, load
from recurrentgemma.checkpoints import find_checkpoint
from recurrentgemma.training.corpus import read_documents, split_held_out
from recurrentgemma.training.data import PackedTokens, encode_document
from recurrentgemma.training.step import mean_loss

MAX_BYTES = 16 * 2**20

# In nats a token. Knowing nothing costs log(4096) = 8.3, the frequency of each token
# alone 6.4; the card says 3.6 for all held-out files.
MAX_LOSS = 4.5


def test_it_is_small_and_in_bfloat16():
    folder = find_checkpoint("nano")
    assert sum(file.stat().st_size for file in folder.iterdir()) < MAX_BYTES
    with (folder / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    assert header["embedder.embedding"]["dtype"] == "BF16"
    assert header["blocks.0.mlp.up.kernel"]["dtype"] == "BF16"
    assert header["blocks.0.mixer.rg_lru.a_param"]["dtype"] == "F32"


def test_it_predicts_files_that_it_was_not_trained_on():
    model, tokenizer = load("nano")
    assert model.config == PRESETS["nano"]
    assert tokenizer is not None
    _, held_out = split_held_out(read_documents("python-stdlib"))
    documents = [encode_document(tokenizer, document) for document in held_out]
    packed = PackedTokens(documents, 512)
    rows = np.linspace(0, packed.num_rows - 1, 8).astype(int)
    assert jax.jit(mean_loss)(model, packed.rows(rows)) < MAX_LOSS
