"""What a `Sampler` gives back: samples and scores."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

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

    @classmethod
    def join(cls, pieces: Sequence[Self]) -> Self:
        """The sample whose text came in these pieces."""
        logits = [piece.logits for piece in pieces if piece.logits is not None]
        return cls(
            text="".join(piece.text for piece in pieces),
            prompt_tokens=pieces[0].prompt_tokens,
            tokens=[token for piece in pieces for token in piece.tokens],
            log_probs=np.concatenate([piece.log_probs for piece in pieces]),
            ended=pieces[-1].ended,
            num_calls=sum(piece.num_calls for piece in pieces),
            logits=np.concatenate(logits) if logits else None,
        )


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
