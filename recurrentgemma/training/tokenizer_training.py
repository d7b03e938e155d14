"""Trains the bundled model's tokenizer: SentencePiece, byte-pair merges, byte fallback.

    python -m recurrentgemma.training.tokenizer_training --output tokenizer.model

Special pieces have Gemma's names, and Gemma's numbers where those are small. Text comes
back exactly as it went in: nothing is normalised, added or removed. Pieces end with
their space and may join letters with punctuation, so that an indentation, `self.` or
`):` with its newline is one piece, and a prompt that ends in a space is nothing unusual.
"""

import argparse
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from recurrentgemma.training.corpus import (
    PYTHON_STDLIB,
    Document,
    read_documents,
    split_held_out,
)

TURN_MARKERS = ["<start_of_turn>", "<end_of_turn>"]

# SentencePiece learns from "sentences" and no merge crosses their ends: several lines,
# so that blank lines become pieces, and few enough that none is cut for its length.
LINES_PER_SENTENCE = 32
MAX_SENTENCE_BYTES = 1 << 20

# Characters outside the most frequent 99.98 % are left to the byte pieces.
CHARACTER_COVERAGE = 0.9998
MAX_PIECE_CHARACTERS = 32


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> bytes:
    """Returns a serialised SentencePiece model of `vocab_size` pieces.

    Args:
      texts: documents to learn from. Tabs are reserved by SentencePiece's trainer:
          sentences that hold one are not learnt from, and bytes encode them.
      vocab_size: pieces, with 4 special, 2 turn markers and 256 bytes among them.

    Raises:
      RuntimeError: from SentencePiece, if the texts hold too few distinct pieces.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        control_symbols=TURN_MARKERS,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        treat_whitespace_as_suffix=True,
        split_by_unicode_script=False,
        character_coverage=CHARACTER_COVERAGE,
        max_sentencepiece_length=MAX_PIECE_CHARACTERS,
        max_sentence_length=MAX_SENTENCE_BYTES,
        minloglevel=2,
    )
    return model.getvalue()


def bytes_per_token(model: bytes, documents: Iterable[Document]) -> float:
    """UTF-8 bytes a token encodes on average."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [document.text for document in documents]
    tokens = sum(len(ids) for ids in processor.encode(texts))
    return sum(len(text.encode()) for text in texts) / tokens


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines), LINES_PER_SENTENCE):
            sentence = "".join(lines[start : start + LINES_PER_SENTENCE])
            if "\t" not in sentence:
                yield sentence


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a SentencePiece tokenizer.")
    parser.add_argument("--data", default=PYTHON_STDLIB)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    training, held_out = split_held_out(read_documents(arguments.data))
    model = train_tokenizer((d.text for d in training), arguments.vocab_size)
    arguments.output.write_bytes(model)
    kind, documents = ("held-out", held_out) if held_out else ("training", training)
    print(f"{bytes_per_token(model, documents):.3f} {kind} bytes per token")


if __name__ == "__main__":
    main()
