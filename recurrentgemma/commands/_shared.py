"""What several commands have: flags, the text to read, the model, a progress bar."""

import codecs
import contextlib
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from absl import flags

from recurrentgemma.commands import UsageError

if TYPE_CHECKING:
    from recurrentgemma.config import GriffinConfig
    from recurrentgemma.generation.prefix import Prefix
    from recurrentgemma.generation.sampler import Sampler

STANDARD_INPUT = "-"
# Longer lines are read in parts of so many bytes: a text may have no lines at all.
LONGEST_LINE = 1 << 16
# A text of more tokens or bytes than this shows a progress bar.
LONG_TEXT = 1024


def define_model(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model",
        "nano",
        "a checkpoint's directory or a bundled model",
        flag_values=values,
    )


def define_variant(values: flags.FlagValues) -> None:
    """Flags for what is made of the model while it is loaded; see `load_sampler`."""
    flags.DEFINE_string(
        "adapters",
        None,
        "a file of adapters that belong to the model",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "quantize",
        None,
        ["int8"],
        "dtype of the matrices of linear layers and of the embedding",
        flag_values=values,
    )


def find_config(name: str) -> "GriffinConfig":
    """The config of a preset or of a checkpoint's directory; weights are not read."""
    from recurrentgemma.config import PRESETS

    if name in PRESETS:
        return PRESETS[name]
    from recurrentgemma.checkpoints import read_config

    return read_config(name)


def define_text(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "file", None, "read the text from this file", flag_values=values
    )
    flags.DEFINE_string(
        "prefix",
        None,
        "a file of `recurrentgemma prefill`, whose text comes before this one",
        flag_values=values,
    )


def define_generation(values: flags.FlagValues, *, max_new_tokens: int) -> None:
    """Flags for how a text is continued; see `generation_settings`."""
    flags.DEFINE_integer(
        "max-new-tokens",
        max_new_tokens,
        "most tokens to generate",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_float(
        "temperature",
        1.0,
        "lower is more predictable; 0 always takes the most probable token",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "top-k", None, "choose among the K most probable tokens", flag_values=values
    )
    flags.DEFINE_float(
        "top-p",
        None,
        "choose among the most probable tokens that together have probability P",
        flag_values=values,
    )
    flags.DEFINE_float(
        "min-p",
        None,
        "choose among tokens at least P times as probable as the most probable one",
        flag_values=values,
    )
    flags.DEFINE_float(
        "repetition-penalty",
        None,
        "above 1 makes the tokens of the text so far less likely",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "seed", 0, "another seed gives another text", flag_values=values
    )
    flags.DEFINE_string(
        "draft",
        None,
        "a smaller model of the same tokenizer, which proposes: the same text, sooner",
        flag_values=values,
    )


def define_stop(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "stop",
        None,
        "end before this string",
        flag_values=values,
    )


def generation_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of whoever generates, checked before anything is loaded.

    Raises:
      UsageError: a stop string is empty.
      ValueError: a number is out of its range.
    """
    from recurrentgemma.generation.sampling import Sampling, check_seed

    settings = {
        "max_new_tokens": values["max-new-tokens"],
        "sampling": Sampling(
            temperature=values["temperature"],
            top_k=values["top-k"],
            top_p=values["top-p"],
            min_p=values["min-p"],
            repetition_penalty=values["repetition-penalty"],
        ),
        "seed": check_seed(values["seed"]),
    }
    if "stop" in values:
        settings["stop"] = tuple(values["stop"] or ())
        if not all(settings["stop"]):
            raise UsageError("--stop: expected a string, got an empty one")
    return settings


def find_text(
    values: dict[str, Any],
    arguments: list[str],
    *,
    may_be_none: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> str | Iterator[str]:
    """The text of the one source that is given.

    Args:
      values: by flag name.
      arguments: the arguments that are no flags.
      may_be_none: whether no source is an empty text.
      progress: called with the bytes taken from a file so far, and its size if that is
        known.

    Returns:
      The text of the command line itself, or the lines of a file, read as they are
      taken; they raise ValueError, naming file and line, where the text is not UTF-8.

    Raises:
      UsageError: there is not one source.
      ValueError: standard input is to be read and is closed.
      OSError: there is no such file.
    """
    file = values["file"]
    sources = [*arguments, *([] if file is None else [file])]
    if not sources and may_be_none:
        return ""
    if len(sources) != 1:
        raise UsageError(
            "expected one text in quotes, --file PATH or - for standard input, "
            f"got {len(sources)}"
        )
    if sources[0] == STANDARD_INPUT:
        check_standard_input()
        return _lines(sys.stdin.buffer, "standard input", progress)
    if file is None:
        return sources[0]
    os.stat(file)
    return lines_of_file(file, progress)


def check_standard_input() -> None:
    """Raises ValueError if standard input is closed."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; redirect it to what is to be read")


def lines_of_file(
    path: str, progress: Callable[[int, int | None], None] | None = None
) -> Iterator[str]:
    """The lines of a file, read as they are taken; see `find_text`."""
    with open(path, "rb") as file:
        yield from _lines(file, path, progress)


def _lines(file: BinaryIO, name: str, progress=None) -> Iterator[str]:
    decoder, number, taken = codecs.getincrementaldecoder("utf-8")(), 1, 0
    size = _size(file)
    try:
        while data := file.readline(LONGEST_LINE):
            yield decoder.decode(data)
            number += data.endswith(b"\n")
            taken += len(data)
            if progress is not None:
                progress(taken, size)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}, line {number}: not UTF-8 text: {error}") from error


def _size(file: BinaryIO) -> int | None:
    """The bytes of a regular file; None of a pipe, which tells no size."""
    try:
        status = os.fstat(file.fileno())
    except (OSError, AttributeError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def load_sampler(values: dict[str, Any]) -> "tuple[Sampler, Prefix | None]":
    """The sampler of --model, and the prefix of --prefix if there is one."""
    path = values.get("prefix")
    if path is not None:
        check_file("--prefix", path)
    if values["adapters"] is not None:
        check_file("--adapters", values["adapters"])

    from recurrentgemma.adapters import load_adapters
    from recurrentgemma.checkpoints import load
    from recurrentgemma.generation.prefix import Prefix
    from recurrentgemma.generation.sampler import Sampler

    model, tokenizer = load(values["model"], quantize=values["quantize"])
    if values["adapters"] is not None:
        model = load_adapters(values["adapters"], model)
    draft = values.get("draft")
    sampler = Sampler(
        model,
        tokenizer,
        draft=None if draft is None else load(draft)[0],
        # A command runs once: programs for lengths that do not come would never run.
        compile_ahead=False,
    )
    return sampler, None if path is None else Prefix.load(path, model)


def check_file(flag: str, path: str) -> None:
    """Raises ValueError, before a model is loaded, if there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"{flag}: there is no file {path}")


def check_target(flag: str, path: str) -> None:
    """Raises ValueError or OSError, before the work, if no file can be written there."""
    if Path(path).is_dir():
        raise ValueError(f"{flag}: {path} is a directory; expected a file")
    folder = Path(path).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag}: nothing can be written in {folder}")


@contextlib.contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt, rather than ending the process at once,
    so that what is half-written is removed."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """The numbers of a flag, with commas between them.

    Raises:
      UsageError: a part is no number.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--{name}: expected numbers with commas between them, got {text!r}"
        ) from None


class ProgressBar:
    """A bar on standard error, once there is enough to do."""

    def __init__(self, title: str, unit: str, *, above: int):
        """Shows nothing yet.

        Args:
          title: what is being done.
          unit: what is counted.
          above: the bar appears when more than this is done or is to be done.
        """
        self._title = title
        self._unit = unit
        self._above = above
        self._bar: Any = None

    def __call__(self, done: int, total: int | None) -> None:
        if self._bar is None and max(done, total or 0) > self._above:
            import tqdm

            self._bar = tqdm.tqdm(
                desc=self._title,
                total=total,
                initial=done,
                unit=self._unit,
                unit_scale=True,
                leave=False,
            )
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()


def reading_bar(unit: str = "token") -> ProgressBar:
    """A bar that is shown while a long text is read."""
    return ProgressBar("reading", unit, above=LONG_TEXT)
