"""Documents to train on, as text and as tokens.

A document is one of three kinds:

    Document      BOS text EOS                              text and EOS count
    Completion    BOS prompt response EOS                   response and EOS count
    Conversation  BOS user's turn, model's turn, ...        the model's turns count

A token counts if the loss has it as a target; BOS never counts. A prompt and its response
are encoded apart, as they are at generation, and nothing is put between them. A
conversation has the layout of `Tokenizer.format_turn`, as `Chat` writes it; the token that
ends a model's turn counts.
"""

import dataclasses
import hashlib
from typing import ClassVar, NamedTuple

import numpy as np

from recurrentgemma.tokenizer import END_OF_TURN, Tokenizer

CHARACTERS_PER_CUT = 256
"""Mean distance of the random places at which a text is cut before it is encoded: a
prompt that ends inside a piece is then nothing new to the model."""


class Span(NamedTuple):
    """Consecutive tokens of a document."""

    ids: list[int]
    counts: bool
    """Whether the loss has these tokens as targets."""


class Cuts(NamedTuple):
    """The random places at which texts are cut."""

    seed: int
    characters: int = CHARACTERS_PER_CUT
    """Mean distance of two cuts; 0 makes no cut."""

    def parts(self, document: "Document") -> list[str]:
        """The text of a document, cut at places that depend on the seed and the name."""
        size = len(document.text)
        if not self.characters:
            return [document.text]
        name = hashlib.sha256(document.name.encode()).digest()
        generator = np.random.default_rng([self.seed, *name])
        cuts = np.sort(generator.integers(0, size, size // self.characters))
        ends = [*cuts.tolist(), size]
        starts = [0, *ends]
        return [
            document.text[start:end] for start, end in zip(starts, ends, strict=False)
        ]


@dataclasses.dataclass(frozen=True)
class Document:
    """A text.

    Its name decides whether the document is held out, and where it is cut: of a file, the
    path relative to the source with forward slashes; of a record, a digest of its content.
    """

    name: str
    text: str

    has_response: ClassVar[bool] = False

    def spans(self, tokenizer: Tokenizer, cuts: Cuts | None = None) -> list[Span]:
        """The tokens, BOS first.

        Args:
          tokenizer: encodes the text.
          cuts: places at which the text is cut before; None cuts nothing.
        """
        ids = [tokenizer.bos_id]
        for part in [self.text] if cuts is None else cuts.parts(self):
            ids += tokenizer.encode(part, add_bos=False)
        ids.append(tokenizer.eos_id)
        return [Span(ids, True)]


@dataclasses.dataclass(frozen=True)
class Completion(Document):
    """A prompt and the response that is to be learnt; the text is both."""

    prompt_characters: int

    has_response = True

    def spans(self, tokenizer: Tokenizer, cuts: Cuts | None = None) -> list[Span]:
        """The tokens, BOS first; nothing is cut."""
        prompt = self.text[: self.prompt_characters]
        response = self.text[self.prompt_characters :]
        ids = tokenizer.encode(response, add_bos=False)
        return [
            Span(tokenizer.encode(prompt), False),
            Span([*ids, tokenizer.eos_id], True),
        ]


@dataclasses.dataclass(frozen=True)
class Conversation(Document):
    """Turns of which the model's are to be learnt; the text is all of them."""

    turns: tuple[tuple[str, str], ...]
    """Pairs of a user's turn and the model's answer."""

    has_response = True

    def spans(self, tokenizer: Tokenizer, cuts: Cuts | None = None) -> list[Span]:
        """The tokens, BOS first; nothing is cut.

        Raises:
          ValueError: the tokenizer has no turn markers.
        """
        end = tokenizer.special_id(END_OF_TURN)
        line_end = tokenizer.encode("\n", add_bos=False)
        spans: list[Span] = []
        for user, model in self.turns:
            opening = tokenizer.format_turn(user, add_bos=not spans)
            spans.append(Span([*(line_end if spans else []), *opening], False))
            spans.append(Span([*tokenizer.encode(model, add_bos=False), end], True))
        return spans


def encode_document(
    tokenizer: Tokenizer, document: Document, *, cut_seed: int | None = None
) -> list[int]:
    """The token ids of a document, such as BOS, the tokens of a text, EOS.

    Args:
      tokenizer: encodes the texts.
      document: the document.
      cut_seed: cuts a text at random places first (see `CHARACTERS_PER_CUT`); the
          places depend on the seed and the document's name alone. None cuts nothing.
    """
    cuts = None if cut_seed is None else Cuts(cut_seed)
    return [id for span in document.spans(tokenizer, cuts) for id in span.ids]


def is_held_out(name: str, share: float) -> bool:
    """Whether the document of this name is held out.

    It is if the SHA-256 of its name, read as a fraction of its range, is below `share`:
    the choice needs no list, and is the same wherever the same documents are.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share
