"""A conversation on a kept prefix: each turn reads only what is new.

The model has read everything said so far; that is its prefix, of one size however long
the conversation is. A turn reads

    <start_of_turn>user\\n{text}<end_of_turn>\\n<start_of_turn>model\\n

and the answer to its <end_of_turn> is written behind it. The prefix before a turn is
kept, so that the turn can be taken back.
"""

import collections
import os
import warnings
from collections.abc import Iterator

from recurrentgemma import _validation as check
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling, check_seed
from recurrentgemma.tokenizer import END_OF_TURN

MAX_UNDO = 16
"""Turns that can be taken back; each costs the memory of a prefix."""

_NOTHING: tuple[Prefix | None, int] = (None, 0)
"""The prefix of a conversation without turns, and their number."""
# A model that was taught to take turns ends this answer within a few words.
_PROBE = "Reply with one word only: yes or no?"
_PROBE_TOKENS = 16


class Chat:
    """A conversation with a model.

    Example:
      >>> chat = Chat(Sampler(*load("recurrentgemma-2b-it")))
      >>> for piece in chat.stream("Who wrote Faust?"):
      ...     print(piece, end="")
      >>> print(chat.send("And when?"))
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        system: str = "",
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 1024,
        seed: int = 0,
    ):
        """Reads nothing yet.

        Args:
          sampler: with the tokenizer of an instruction-tuned model. Another model gets
            a warning at the first turn.
          system: what the model is told first. These models know no system turn: it is
            put before the text of the first user turn.
          sampling: how tokens are chosen.
          max_new_tokens: most tokens of an answer.
          seed: seed of the first turn; later ones count up.

        Raises:
          ValueError: an argument is out of its range, or the tokenizer is missing or
            has no turn markers.
        """
        check.instance("sampler", sampler, Sampler, "a Sampler")
        check.instance("system", system, str, "a text")
        check.instance("sampling", sampling, Sampling, "a Sampling")
        if sampler.tokenizer is None:
            raise ValueError("sampler: expected one with a tokenizer, got none")
        self.sampler = sampler
        self.system = system
        self.sampling = sampling
        self.max_new_tokens = check.positive_integer("max_new_tokens", max_new_tokens)
        self.seed = check_seed(seed)
        self._tokenizer = sampler.tokenizer
        self._end_of_turn = self._tokenizer.special_id(END_OF_TURN)
        self._was_checked = False
        self._now = _NOTHING
        self._earlier = collections.deque(maxlen=MAX_UNDO)

    @property
    def num_tokens(self) -> int:
        """Length of the conversation in tokens."""
        prefix, _ = self._now
        return 0 if prefix is None else int(prefix.num_tokens[0])

    def send(self, text: str) -> str:
        """Says something; returns the whole answer. See `stream`."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """Says something; yields the answer as it comes.

        The turn counts once the answer is complete: if the iterator is left before its
        end, the conversation is as it was.

        Args:
          text: what the user says.

        Raises:
          ValueError: the text is empty or not valid UTF-8; of the iterator: the
            conversation has changed since this call, by another turn for example.
        """
        if not isinstance(text, str) or not text.strip():
            check.refuse("text", "something to say", text)
        self._check_model()
        before = self._now
        prefix, num_turns = before
        stream = self.sampler.stream(
            self._turn(text),
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            seed=self.seed + num_turns,
            prefix=prefix,
        )

        def check_unchanged():
            if self._now is not before:
                raise ValueError(
                    "stream: expected it to be read before the next turn, got a "
                    "conversation that has changed since; say it again"
                )

        def pieces():
            for piece in stream:
                check_unchanged()
                yield piece
            check_unchanged()
            self._go_on(stream.prefix(), num_turns + 1)

        return pieces()

    def undo(self) -> None:
        """Takes the last turn back, text and answer; the next one gets its seed.

        Raises:
          ValueError: there is none, or it is too long ago.
        """
        if not self._earlier:
            raise ValueError("There is no turn to take back.")
        self._now = self._earlier.pop()

    def reset(self) -> None:
        """Forgets the conversation."""
        self._now = _NOTHING
        self._earlier.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation as a prefix file.

        Raises:
          ValueError: nothing was said yet, or the file cannot be written.
        """
        path = check.path("path", path)
        prefix, _ = self._now
        if prefix is None:
            raise ValueError("There is nothing to save: nothing was said yet.")
        prefix.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues a saved conversation, or any text that was read, instead of this.

        Raises:
          ValueError: see `Prefix.load`; the conversation is then as it was.
        """
        prefix = Prefix.load(path, self.sampler.model)
        if prefix.batch_size != 1:
            raise ValueError(f"{path} holds {prefix.batch_size} texts; expected one.")
        self._go_on(prefix, self._now[1])

    def _go_on(self, prefix: Prefix, num_turns: int) -> None:
        self._earlier.append(self._now)
        self._now = (prefix, num_turns)

    def _turn(self, text: str) -> list[int]:
        """The tokens of a turn, behind those of the conversation."""
        prefix, _ = self._now
        if prefix is None:
            return self._tokenizer.format_turn(
                f"{self.system}\n\n{text}" if self.system else text
            )
        # An answer that was cut off, or a text that is no conversation, ends here.
        ended = prefix.history.last_token[0] == self._end_of_turn
        return [
            *([] if ended else [self._end_of_turn]),
            *self._tokenizer.encode("\n", add_bos=False),
            *self._tokenizer.format_turn(text, add_bos=False),
        ]

    def _check_model(self) -> None:
        """Warns, once, of a model that was not taught to take turns."""
        if self._was_checked:
            return
        self._was_checked = True
        probe = self.sampler.stream(
            self._tokenizer.format_turn(_PROBE),
            max_new_tokens=_PROBE_TOKENS,
            sampling=Sampling(temperature=0),
            end_tokens=[self._end_of_turn],
        )
        for _ in probe:
            pass
        if not probe.ended:
            warnings.warn(
                "This model does not end its turns: it seems to be pretrained only, not "
                "instruction-tuned, and will continue the text rather than answer.",
                stacklevel=3,
            )
