"""What a `Sampler` gives back: samples, scores, and text as it comes."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from recurrentgemma.generation.batching import Generation
from recurrentgemma.generation.colored_text import HasLogProbs
from recurrentgemma.generation.prefix import Prefix


@dataclasses.dataclass(frozen=True)
class Sample(HasLogProbs):
    """What was generated for one prompt."""

    text: str
    """The generated text without its end token or stop string; empty if the sampler has
    no tokenizer."""
    prompt_tokens: list[int]
    """The prompt as the model read it, without the prefix."""
    tokens: list[int]
    """The generated tokens, to the end token or the end of a stop string."""
    log_probs: np.ndarray
    """Log-probability of each of `tokens` under the model, before penalty, temperature
    and filters; float32, natural logarithm."""
    ended: bool
    """Whether an end token or a stop string came, rather than `max_new_tokens`."""
    num_calls: int
    """Calls of the model that wrote them; fewer than `tokens` with a draft."""
    logits: np.ndarray | None = None
    """The model's logits before each of `tokens`, float32 [len(tokens), V], if asked
    for."""


@dataclasses.dataclass(frozen=True, repr=False)
class Score(HasLogProbs):
    """How probable a text is to the model, token by token."""

    tokens: list[int]
    """The scored tokens. The first of a text that starts from no prefix (the begin
    token, usually) is not among them: nothing comes before it."""
    log_probs: np.ndarray
    """Log-probability of each of `tokens` given all before it; float32 [len(tokens)],
    natural logarithm."""
    num_bytes: int | None
    """Length of the text in bytes of UTF-8; None if token ids were scored."""
    prefix: Prefix | None = None
    """Everything up to here, to continue from; None from `score_many`."""

    def __repr__(self) -> str:
        figures = f"perplexity={self.perplexity:.4f}"
        if self.num_bytes:
            figures += f", bits_per_byte={self.bits_per_byte:.4f}"
        elif self.num_bytes is None:
            figures += ", bits_per_byte=nan for token ids"
        return f"Score(tokens={len(self.tokens)}, {figures})"

    @property
    def total_log_prob(self) -> float:
        """Sum of `log_probs`, in nats."""
        return float(np.sum(self.log_probs, dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log-probability of a token; nan without tokens."""
        if not self.tokens:
            return float("nan")
        return float(np.exp(-self.total_log_prob / len(self.tokens)))

    @property
    def bits_per_byte(self) -> float:
        """Minus the log-probability in bits for a byte of text; nan for token ids, whose
        bytes are not known, and for an empty text."""
        if not self.num_bytes:
            return float("nan")
        return -self.total_log_prob / np.log(2) / self.num_bytes


class TextStream(Iterator[str]):
    """The text of one prompt as it comes; pieces that never split a character.

    Joined, the pieces are the text of a call with the same arguments. The memory does
    not grow with the text.
    """

    def __init__(self, generation: Generation, *, model_digest: str, has_stop: bool):
        self._generation = generation
        self._parts = iter(generation)
        self._model_digest = model_digest
        self._has_stop = has_stop
        self.ended = False
        """Whether an end token or a stop string has come."""

    def __next__(self) -> str:
        while True:
            part = next(self._parts)
            self.ended = part.ended
            if part.text:
                return part.text

    def close(self) -> None:
        """Frees the memory of the text; the stream ends, without a prefix."""
        self._parts = iter(())
        self._generation.close()

    def prefix(self) -> Prefix:
        """The prompt and what was written so far, to continue from.

        Raises:
          ValueError: there are stop strings, past which the model has read already;
            nothing was taken from the stream yet; or it was closed.
        """
        if self._has_stop:
            raise ValueError(
                "stop: expected none for a prefix, as the model reads past a stop "
                "string; continue from the text instead"
            )
        return self._generation.prefix(0, self._model_digest)
