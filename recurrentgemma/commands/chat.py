"""`recurrentgemma chat`: a conversation in the terminal."""

import contextlib
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING, Any

from absl import flags

from recurrentgemma.commands import UsageError, _shared, one_line

if TYPE_CHECKING:
    from recurrentgemma.generation.chat import Chat

USAGE = "[FLAGS]"
DETAILS = (
    "Talks with an instruction-tuned model. What was said is kept as a prefix, so that a "
    "turn reads only what is new. /help shows what else can be typed."
)

QUOTES = '"""'
GOES_ON = "\\"
MORE = "... "
HELP = f"""\
/save FILE   keep the conversation in a file
/load FILE   continue a saved one, or a text of `recurrentgemma prefill`
/undo        take the last turn back
/reset       forget the conversation
/help        show this
/quit        leave; the end of the input does too
A line that ends with {GOES_ON} goes on in the next one. What stands between two lines of
{QUOTES} is one text, whatever it begins with."""


def define_flags(values: flags.FlagValues) -> None:
    _shared.define_model(values)
    _shared.define_variant(values)
    flags.DEFINE_string(
        "system", "", "what the model is told before the first turn", flag_values=values
    )
    flags.DEFINE_string(
        "load", None, "continue this saved conversation", flag_values=values
    )
    _shared.define_generation(values, max_new_tokens=1024)


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    _shared.check_standard_input()
    settings = _shared.generation_settings(values)
    if values["load"] is not None:
        _shared.check_file("--load", values["load"])
    sampler, _ = _shared.load_sampler(values)

    from recurrentgemma.generation.chat import Chat

    chat = Chat(sampler, system=values["system"], **settings)
    if values["load"] is not None:
        chat.load(values["load"])
    terminal = _Terminal()
    while True:
        line = terminal.read_line(f"[{chat.num_tokens:,} tokens] > ")
        if line is None or line.strip() == "/quit":
            return
        try:
            if line.startswith("/"):
                _obey(chat, line)
            elif text := terminal.read_rest(line):
                _say(chat, text)
        except (ValueError, RuntimeError, MemoryError) as error:
            _tell(one_line(error))


class _Terminal:
    """The user's lines, from a terminal or a pipe."""

    def __init__(self):
        # A turn that is not UTF-8 is refused by itself, without those after it.
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # pyright: ignore
        self._is_interactive = sys.stdin.isatty()
        if self._is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() then edits lines

    def read_line(self, prompt: str) -> str | None:
        """The next line; None at the end of the input or of the terminal."""
        try:
            with _shared.ctrl_c_raises():
                return input(prompt if self._is_interactive else "")
        except (EOFError, OSError):
            return None
        except KeyboardInterrupt:
            # The line editor has put the terminal back; now end as anywhere else.
            signal.raise_signal(signal.SIGINT)
            raise

    def read_rest(self, line: str | None) -> str:
        """The whole text that begins with this line."""
        lines = []
        if line is not None and line.strip() == QUOTES:
            while (line := self.read_line(MORE)) is not None and line.strip() != QUOTES:
                lines.append(line)
            return "\n".join(lines)
        while line is not None and line.endswith(GOES_ON):
            lines.append(line.removesuffix(GOES_ON))
            line = self.read_line(MORE)
        return "\n".join([*lines, *([] if line is None else [line])])


def _obey(chat: "Chat", line: str) -> None:
    name, _, argument = line.strip().partition(" ")
    path = os.path.expanduser(argument.strip())
    plain = {"/undo": chat.undo, "/reset": chat.reset, "/help": lambda: _tell(HELP)}
    with_file = {"/save": chat.save, "/load": chat.load}
    if name in with_file:
        if not path:
            raise ValueError(f"{name}: expected a file")
        with _shared.ctrl_c_raises():
            with_file[name](path)
    elif name in plain and not path:
        plain[name]()
    else:
        raise ValueError(f"{line.strip()!r} is no command; /help shows them")


def _say(chat: "Chat", text: str) -> None:
    """A turn: prints the answer as it comes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        pieces = chat.stream(text)
    for warning in caught:
        _tell(" ".join(str(warning.message).split()))
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        print(flush=True)


def _tell(message: str) -> None:
    """Prints what is no answer."""
    print(message, file=sys.stderr, flush=True)
