"""Nats a token and bits a byte of models on the held-out files of nano's corpus.

Held-out documents are those of `training.corpus`. Bits a byte are the nats of all tokens
after each document's first, its end included, over the bytes of the text: read in rows
of the given numbers of tokens, each from an empty state. `xz -9` compresses the same
documents as one concatenated file.
"""

import lzma
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm
from absl import flags

from recurrentgemma.benchmarks.report import Column, Report, Row, note
from recurrentgemma.benchmarks.sweep import counts
from recurrentgemma.checkpoints import load, named_parameters
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import (
    PYTHON_STDLIB,
    Document,
    read_documents,
    split_held_out,
)
from recurrentgemma.training.data import PackedTokens, encode_document
from recurrentgemma.training.step import TOKENS, make_evaluation_step

ROW_TOKENS = ["512", "4096"]
TOKENS_PER_BATCH = 4096
XZ_PRESET = 9


def xz_bits_per_byte(documents: list[Document]) -> float:
    """Bits a byte of `xz -9` on the documents as one concatenated file."""
    text = "".join(document.text for document in documents).encode()
    return 8 * len(lzma.compress(text, preset=XZ_PRESET)) / len(text)


def held_out_loss(
    model: Griffin, tokenizer: Tokenizer, documents: list[Document], row_tokens: int
) -> dict[str, float]:
    """Nats a token and bits a byte, reading rows of `row_tokens`."""
    ids = [encode_document(tokenizer, document) for document in documents]
    packed = PackedTokens(ids, row_tokens)
    batch_size = max(1, TOKENS_PER_BATCH // row_tokens)
    step, params = make_evaluation_step(model), named_parameters(model)
    total = count = 0.0
    for batch in tqdm.tqdm(packed.batches(batch_size), desc=f"rows of {row_tokens}"):
        sums = step(params, batch)
        total, count = total + float(sums["loss"]), count + float(sums[TOKENS])
    bits = total / math.log(2)
    size = sum(len(document.text.encode()) for document in documents)
    return {"loss": total / count, "bits_per_byte": bits / size}


def measure(path: str, documents: list[Document], row_tokens: Sequence[int]) -> Row:
    """The figures of one model."""
    model, tokenizer = load(path)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer")
    return {
        "name": path,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "held_out": {
            str(count): held_out_loss(model, tokenizer, documents, count)
            for count in row_tokens
        },
    }


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    flags.DEFINE_list(
        "models",
        ["nano"],
        "presets or checkpoints, such as nano and its Transformer twin",
        flag_values=values,
    )
    flags.DEFINE_list("lengths", ROW_TOKENS, "tokens of a row", flag_values=values)


def run(values: dict[str, Any], folder: Path) -> None:
    """A row for each model."""
    lengths = counts("lengths", values["lengths"])
    _, documents = split_held_out(read_documents(PYTHON_STDLIB))
    xz = xz_bits_per_byte(documents)
    report = Report(
        folder / "held_out.json",
        [
            Column("", "name", 30),
            Column("parameters", "parameters"),
            *(
                Column(f"{title} {length}", f"held_out/{length}/{key}", 16)
                for length in lengths
                for title, key in (("nats", "loss"), ("bits/byte", "bits_per_byte"))
            ),
        ],
        held_out_documents=len(documents),
        xz_bits_per_byte=xz,
    )
    note(f"xz -{XZ_PRESET}: {xz:.4g} bits/byte")
    for path in values["models"]:
        report.add(measure(path, documents, lengths))
