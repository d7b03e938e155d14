"""The text of a row until a stop string, which may span tokens and is cut off."""

from collections.abc import Sequence

from recurrentgemma.tokenizer import Tokenizer


class TextUntilStop:
    """Text of tokens that arrive bit by bit, until the first stop string.

    What may become a stop string is held back; characters are never split. There is no
    text without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]):
        self._decoder = None if tokenizer is None else tokenizer.stream_decoder()
        self._stop = stop
        self._held = ""

    def push(self, tokens: Sequence[int]) -> tuple[str, int | None]:
        """The text that these tokens complete, without a stop string and what follows;
        and how many of them it took until a stop string was complete, if one is."""
        if self._decoder is None:
            return "", None
        if not self._stop:
            return self._decoder.push(tokens), None
        shown = ""
        for count, token in enumerate(tokens, start=1):
            self._held += self._decoder.push([token])
            found = [i for stop in self._stop if (i := self._held.find(stop)) >= 0]
            if found:
                return shown + self._held[: min(found)], count
            keep = max(_overlap(self._held, stop) for stop in self._stop)
            release = len(self._held) - keep
            shown += self._held[:release]
            self._held = self._held[release:]
        return shown, None

    def flush(self) -> str:
        """The text of what is held back: the row ends here."""
        return self._held + self._decoder.flush() if self._decoder else ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
