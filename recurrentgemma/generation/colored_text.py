"""Text whose colours show how probable each token was to the model.

A token that the model expected is left white; the less probable it was, the darker its
background, down to a probability of 1 in 1000:

    darkness = min(1, log p / log(1/1000))
"""

import dataclasses
import html
import math

import numpy as np

from recurrentgemma.tokenizer import Tokenizer

_DARKEST_PROBABILITY = 1e-3
_DARKEST = (232, 122, 65)
"""The darkest background, red, green and blue; black text on it stays readable."""
_WHITE = 255
_STYLE = (
    "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;"
    "background:white;color:black;margin:0;padding:0.5em"
)


@dataclasses.dataclass(frozen=True, repr=False)
class ColoredText:
    """A text with a colour for each token; a notebook shows it as HTML.

    Pointing at a token shows its probability. Outside a notebook, it is shown as the
    plain text.
    """

    pieces: list[tuple[str, float]]
    """Text and log-probability (natural logarithm) of each token. Tokens that are
    parts of one character are one piece, whose log-probability is their sum."""

    def __str__(self) -> str:
        return "".join(text for text, _ in self.pieces)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        legend = "".join(
            _span(f" {probability:g} ", math.log(probability))
            for probability in (1, 0.1, 0.01, _DARKEST_PROBABILITY)
        )
        text = "".join(_span(*piece) for piece in self.pieces)
        lines = text, f"probability {legend}"
        return "".join(f'<pre style="{_STYLE}">{line}</pre>' for line in lines)


class HasLogProbs:
    """A result with tokens and their log-probabilities."""

    tokens: list[int]
    log_probs: np.ndarray

    def colored(self, tokenizer: Tokenizer) -> ColoredText:
        """The text of `tokens`, coloured by `log_probs`: the last line of a cell.

        Args:
          tokenizer: the tokenizer of the model that gave the log-probabilities.
        """
        pieces, decoder, waiting = [], tokenizer.stream_decoder(), 0.0
        for token, log_prob in zip(self.tokens, self.log_probs, strict=True):
            waiting += float(log_prob)
            if text := decoder.push([token]):
                pieces.append((text, waiting))
                waiting = 0.0
        if text := decoder.flush():
            pieces.append((text, waiting))
        return ColoredText(pieces)


def _span(text: str, log_prob: float) -> str:
    darkness = min(1.0, log_prob / math.log(_DARKEST_PROBABILITY))
    color = ",".join(str(round(_WHITE + darkness * (end - _WHITE))) for end in _DARKEST)
    return (
        f'<span title="{math.exp(log_prob):.2g}" '
        f'style="background:rgb({color})">{html.escape(text)}</span>'
    )
