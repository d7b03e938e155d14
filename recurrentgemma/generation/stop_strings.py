"""The text of a row until a stop string, which may span tokens and is cut off."""

from collections.abc import Sequence
from typing import NamedTuple

from recurrentgemma.tokenizer import Tokenizer


class Shown(NamedTuple):
    """What some tokens add to the text that is shown."""

    text: str
    stopped_after: int | None
    """How many of the tokens it took until a stop string was complete; None: none is."""


class TextUntilStop:
    """Text of tokens that arrive bit by bit, until the first stop string.

    What may become a stop string is held back; characters are never split.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._decoder = tokenizer.stream_decoder()
        self._stop = stop
        self._held = ""

    def push(self, tokens: Sequence[int]) -> Shown:
        """The text that these tokens complete, without a stop string and what follows.

        Raises:
          ValueError: an id is negative.
        """
        if not self._stop:
            return Shown(self._decoder.push(tokens), None)
        shown = ""
        for count, token in enumerate(tokens, start=1):
            self._held += self._decoder.push([token])
            found = [i for stop in self._stop if (i := self._held.find(stop)) >= 0]
            if found:
                return Shown(shown + self._held[: min(found)], count)
            keep = max(_overlap(self._held, stop) for stop in self._stop)
            release = len(self._held) - keep
            shown += self._held[:release]
            self._held = self._held[release:]
        return Shown(shown, None)

    def flush(self) -> str:
        """The text of what is held back: the row ends here."""
        return self._held + self._decoder.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
