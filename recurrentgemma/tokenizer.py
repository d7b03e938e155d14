"""SentencePiece tokens, special tokens and chat turns.

Special tokens (turn markers, BOS and the like) are only ever put in by their id.
SentencePiece would match those that its model stores as user-defined symbols in plain
text; such text is encoded with a copy of the model in which they are control symbols,
which no text matches. Other user-defined symbols (Gemma's newlines, runs of spaces and
HTML tags) are ordinary vocabulary.
"""

import codecs
import functools
import os
import re
from collections.abc import Iterable
from typing import Any

import sentencepiece
from absl import logging
from sentencepiece import sentencepiece_model_pb2

from recurrentgemma import _validation as check

START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"

_SPECIAL_SPELLING = re.compile(
    r"<(?:pad|bos|eos|unk|mask|2mass|unused\d+|start_of_\w+|end_of_\w+)>"
    r"|\[@BOS@\]|\[multimodal\]"
)
REPLACEMENT = "\ufffd"
LINES = "a\nb"
"""A text that a tokenizer of lines keeps."""
MAX_CHARACTER_BYTES = 4


class Tokenizer:
    """A SentencePiece model with Gemma's conventions.

    A model that loses line ends is accepted with a warning in the log.

    Example::

      tokenizer = Tokenizer("tokenizer.model")
      tokenizer.decode(tokenizer.encode("def f(x):"))  # "def f(x):"

    Args:
      model: the path of a SentencePiece model, or its bytes.

    Raises:
      ValueError: the file is missing, is no SentencePiece model, or has no begin or
        end token.
    """

    model_bytes: bytes
    """The SentencePiece model as it is stored."""
    bos_id: int
    eos_id: int
    pad_id: int
    """The padding token; the end token if the model has none."""
    unk_id: int
    """The token of what no piece spells."""

    def __init__(self, model: str | os.PathLike[str] | bytes):
        if isinstance(model, bytes):
            self.model_bytes, source = model, "the given bytes"
        else:
            model = check.path("model", model)
            source = str(model)
            try:
                self.model_bytes = model.read_bytes()
            except OSError as error:
                raise ValueError(
                    f"Cannot read the tokenizer {source}: {error.strerror}."
                ) from error
        self._processor = _load_processor(self.model_bytes, source)
        self.bos_id = self._find_id(self._processor.bos_id(), "<bos>", "<s>")
        self.eos_id = self._find_id(self._processor.eos_id(), "<eos>", "</s>")
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(
                f"The tokenizer {source} has no begin or no end token: expected <bos> "
                "and <eos>, or <s> and </s>."
            )
        probe = self._processor.decode(self._processor.encode(LINES))
        if probe != LINES:
            logging.warning(
                "The tokenizer %s loses line ends: %r comes back as %r. Train it with "
                "normalization_rule_name='identity' and byte_fallback=True.",
                source,
                LINES,
                probe,
            )
        pad_id = self._find_id(self._processor.pad_id(), "<pad>")
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.unk_id = self._processor.unk_id()

    def _find_id(self, known: int, *pieces: str) -> int:
        """`known` unless it is negative, else the id of the first such piece, or -1."""
        if known >= 0:
            return known
        for piece in pieces:
            piece_id = self._processor.piece_to_id(piece)
            if self._processor.id_to_piece(piece_id) == piece:
                return piece_id
        return -1

    @property
    def vocab_size(self) -> int:
        """The number of pieces."""
        return self._processor.get_piece_size()

    def special_id(self, piece: str) -> int:
        """The id of a special token, by its name.

        Raises:
          ValueError: the vocabulary has no such piece.
        """
        check.string("piece", piece)
        piece_id = self._find_id(-1, piece)
        if piece_id < 0:
            raise ValueError(f"The tokenizer has no token {piece!r}.")
        return piece_id

    def encode(self, text: str | bytes, *, add_bos: bool = True) -> list[int]:
        """The token ids of a text, in which no special token is recognised.

        Args:
          text: the text; bytes are read as UTF-8.
          add_bos: whether the begin token comes first.

        Raises:
          ValueError: the text is no text, or not valid UTF-8.
        """
        text = _valid_text(text)
        check.boolean("add_bos", add_bos)
        special = _SPECIAL_SPELLING.search(text)
        processor = self._literal_processor if special else self._processor
        ids = processor.encode(text)
        return [self.bos_id, *ids] if add_bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids.

        Control tokens (begin, end, padding) leave nothing. Turn markers are shown where
        the model stores them as user-defined symbols, as Gemma's does. Ids past the
        last piece (rows that pad an embedding) leave nothing. Incomplete characters
        become U+FFFD, one for each byte.

        Raises:
          ValueError: an id is no integer, or negative.
        """
        return self._processor.decode(self.known_ids(ids))

    def format_turn(self, text: str | bytes, *, add_bos: bool = True) -> list[int]:
        """The ids of a user's turn and of the opening of the model's answer.

        The layout is `<start_of_turn>user\\n{text}<end_of_turn>\\n<start_of_turn>model\\n`;
        markers that the text spells out stay text.

        Raises:
          ValueError: the text is not valid UTF-8, or the tokenizer has no turn markers.
        """
        text = _valid_text(text)
        check.boolean("add_bos", add_bos)
        start, end = self.special_id(START_OF_TURN), self.special_id(END_OF_TURN)
        return [
            *([self.bos_id] if add_bos else []),
            start,
            *self.encode("user\n" + text, add_bos=False),
            end,
            *self.encode("\n", add_bos=False),
            start,
            *self.encode("model\n", add_bos=False),
        ]

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for tokens that arrive one by one."""
        return StreamDecoder(self)

    def piece(self, token: int) -> str:
        """The piece of an id as SentencePiece spells it: `▁` is a space, `<0x0A>` a byte.

        Raises:
          ValueError: there is no such piece.
        """
        token = check.integer("token", token, least=0, most=self.vocab_size - 1)
        return self._processor.id_to_piece(token)

    def byte_of(self, token: int) -> int | None:
        """The byte that a byte-fallback token stands for; None for other tokens.

        Raises:
          ValueError: there is no such piece.
        """
        token = check.integer("token", token, least=0, most=self.vocab_size - 1)
        if not self._processor.is_byte(token):
            return None
        return int(self._processor.id_to_piece(token)[1:-1], 16)

    def model_proto(self) -> Any:
        """A new `ModelProto` of SentencePiece: pieces, scores and settings."""
        model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        model.ParseFromString(self.model_bytes)
        return model

    def known_ids(self, ids: Iterable[int]) -> list[int]:
        """The ids, as Python integers, without those past the last piece.

        Raises:
          ValueError: an id is no integer, or negative.
        """
        check.series("ids", ids, "a list of token ids")
        known = []
        vocab_size = self.vocab_size
        for i, token in enumerate(ids):
            if type(token) is not int or token < 0:
                token = check.integer(f"ids[{i}]", token, least=0)
            if token < vocab_size:
                known.append(token)
        return known

    @functools.cached_property
    def _literal_processor(self) -> sentencepiece.SentencePieceProcessor:
        """The model with its special user-defined symbols made control symbols."""
        model = self.model_proto()
        for piece in model.pieces:
            if piece.type == piece.USER_DEFINED and _SPECIAL_SPELLING.fullmatch(
                piece.piece
            ):
                piece.type = piece.CONTROL
        return _load_processor(model.SerializeToString(), "its literal form")


class StreamDecoder:
    """Text of tokens that arrive bit by bit, never splitting a character.

    What `push` and a last `flush` return, joined, is `Tokenizer.decode` of all ids.
    Only the bytes of an incomplete character are held back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._held = b""
        # Tokens up to the first visible text. Later ones are decoded behind them:
        # SentencePiece may treat a piece differently at the start of a text.
        self._opening: list[int] = []
        self._opened = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete.

        Raises:
          ValueError: an id is no integer, or negative.
        """
        parts = []
        for token in self._tokenizer.known_ids(ids):
            byte = self._tokenizer.byte_of(token)
            if byte is None:
                text = self._release(final=True) + self._surface(token)
            else:
                self._held += bytes([byte])
                text = self._release(final=False)
            if not self._opened:
                self._opening.append(token)
                self._opened = bool(text)
            parts.append(text)
        return "".join(parts)

    def flush(self) -> str:
        """The text of what is held back: the stream ends here."""
        return self._release(final=True)

    def _surface(self, token: int) -> str:
        before = self._tokenizer.decode(self._opening)
        return self._tokenizer.decode([*self._opening, token])[len(before) :]

    def _release(self, *, final: bool) -> str:
        """Takes characters off the held bytes, and all bytes that cannot be any."""
        text = ""
        while self._held and (final or not _is_incomplete(self._held)):
            character = _first_character(self._held)
            text += character or REPLACEMENT
            self._held = self._held[len(character.encode()) or 1 :]
        return text


def _first_character(data: bytes) -> str:
    """The character that the bytes begin with, or "" if they begin with none."""
    for size in range(1, MAX_CHARACTER_BYTES + 1):
        try:
            return data[:size].decode()
        except UnicodeDecodeError:
            continue
    return ""


def _is_incomplete(data: bytes) -> bool:
    """Whether more bytes may make a character of these."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data) == ""
    except UnicodeDecodeError:
        return False


def _valid_text(text: str | bytes) -> str:
    if not isinstance(text, str | bytes):
        check.refuse("text", "a text, or bytes of UTF-8", text)
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        text.encode("utf-8")
    except UnicodeError as error:
        raise ValueError(
            f"The text is not valid UTF-8: {error}. Decode it with its own encoding, "
            "or replace the invalid parts, first."
        ) from error
    return text


def _load_processor(
    model_bytes: bytes, source: str
) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        # An empty or foreign file makes SentencePiece raise, or abort without loading.
        loaded = bool(model_bytes) and processor.LoadFromSerializedProto(model_bytes)
    except RuntimeError:
        loaded = False
    if not loaded or processor.get_piece_size() == 0:
        raise ValueError(f"Not a SentencePiece model, or a damaged one: {source}.")
    return processor
