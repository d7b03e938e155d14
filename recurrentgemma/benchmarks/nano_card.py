"""The numbers on the bundled model's card.

Held-out documents are those of `training.corpus`. Bits per byte are the nats of all
tokens after each document's first, its end included, over the bytes of the text: read
in rows of the given numbers of tokens, each from an empty state. `xz -9` compresses the
same documents as one concatenated file. Samples are continuations of the begin token
alone; one that did not end by itself is cut before its last top-level statement, which
may be unfinished, and counts as accepted if `ast.parse` accepts the rest and the rest
is not empty.
"""

import argparse
import ast
import lzma
import math
import warnings

import jax
import numpy as np
import tqdm

from recurrentgemma.benchmarks.report import Column, Report, Row, note
from recurrentgemma.checkpoints import load, named_parameters
from recurrentgemma.generation.results import Sample
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
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

ROW_TOKENS = (512, 4096)
TOKENS_PER_BATCH = 4096
XZ_PRESET = 9
SAMPLES_PER_BATCH = 50
TEMPERATURE = 0.8


def size_in_bytes(documents: list[Document]) -> int:
    """UTF-8 bytes of the documents' texts."""
    return sum(len(document.text.encode()) for document in documents)


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
    return {"loss": total / count, "bits_per_byte": bits / size_in_bytes(documents)}


def complete_statements(sample: Sample) -> str:
    """The sample, less its last top-level statement if it did not end by itself."""
    if sample.ended:
        return sample.text
    lines = sample.text.splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line[0] not in " \t\r\n#)]}"]
    return "".join(lines[: starts[-1]]) if starts else ""


def is_python(text: str) -> bool:
    """Whether `ast.parse` accepts a text that is not blank."""
    if not text.strip():
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def sampled_texts(
    model: Griffin, tokenizer: Tokenizer, count: int, max_new_tokens: int
) -> list[Sample]:
    """Continuations of the begin token, seeds 0, 1, ..."""
    sampler = Sampler(model, tokenizer, compile_ahead=False)
    samples: list[Sample] = []
    for start in tqdm.trange(0, count, SAMPLES_PER_BATCH, desc="samples"):
        samples += sampler(
            [""] * min(SAMPLES_PER_BATCH, count - start),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=TEMPERATURE),
            seed=start,
        )
    return samples


def measure(path: str, documents: list[Document], options: argparse.Namespace) -> Row:
    """Everything about one model."""
    model, tokenizer = load(path)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer")
    samples = sampled_texts(model, tokenizer, options.samples, options.max_new_tokens)
    texts = [complete_statements(sample) for sample in samples]
    figures = {
        str(row_tokens): held_out_loss(model, tokenizer, documents, row_tokens)
        for row_tokens in options.row_tokens
    }
    return {
        "name": path,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "held_out": figures,
        "accepted_share": float(np.mean([is_python(text) for text in texts])),
        "median_lines": float(np.median([len(text.splitlines()) for text in texts])),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument(
        "--models",
        nargs="+",
        default=["nano"],
        help="presets or checkpoints, such as nano and its Transformer twin",
    )
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--row-tokens", type=int, nargs="+", default=ROW_TOKENS)


def run(options: argparse.Namespace) -> None:
    """A row for each model."""
    _, documents = split_held_out(read_documents(PYTHON_STDLIB))
    lengths = options.row_tokens
    columns = [
        Column("", "name", 30),
        Column("parameters", "parameters"),
        *(Column(f"bits/byte {n}", f"held_out/{n}/bits_per_byte", 16) for n in lengths),
        Column("accepted %", "accepted_share", scale=100),
        Column("median lines", "median_lines"),
    ]
    xz = xz_bits_per_byte(documents)
    report = Report(
        options.output,
        columns,
        held_out_documents=len(documents),
        held_out_bytes=size_in_bytes(documents),
        xz_bits_per_byte=xz,
        samples=options.samples,
        max_new_tokens=options.max_new_tokens,
        temperature=TEMPERATURE,
    )
    note(f"xz -{XZ_PRESET}: {xz:.4g} bits/byte")
    for path in options.models:
        report.add(measure(path, documents, options))
