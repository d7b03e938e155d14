"""`recurrentgemma sample`: continues a text."""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma.commands import UsageError

USAGE = '[TEXT | - | --file PATH] [FLAGS]     for example: sample "def "'
DETAILS = (
    "Continues a text and prints what the model writes as it writes it. The memory does "
    "not depend on how long the text is or becomes. A text that begins with a dash goes "
    "after --."
)

STANDARD_INPUT = "-"
# A prompt of more tokens than this shows a progress bar.
LONG_PROMPT = 1024


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model",
        "nano",
        "a checkpoint's directory or a bundled model",
        flag_values=values,
    )
    flags.DEFINE_string(
        "file", None, "read the text from this file", flag_values=values
    )
    flags.DEFINE_integer(
        "max-new-tokens",
        200,
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
    flags.DEFINE_integer(
        "seed", 0, "another seed gives another text", flag_values=values
    )
    flags.DEFINE_boolean("echo", False, "print the text first", flag_values=values)


def run(values: dict[str, Any], arguments: list[str]) -> None:
    from recurrentgemma.checkpoints import load
    from recurrentgemma.sampler import Sampler
    from recurrentgemma.sampling import Sampling, check_seed

    # Wrong flags are told before anything is read or loaded.
    sampling = Sampling(values["temperature"], values["top-k"], values["top-p"])
    seed = check_seed(values["seed"])
    prompt = _read_prompt(values["file"], arguments)
    model, tokenizer = load(values["model"])
    # One prompt: programs for other lengths would never run.
    sampler = Sampler(model, tokenizer, compile_ahead=False)
    with _ProgressBar() as progress:
        for piece in sampler.stream(
            prompt,
            max_new_tokens=values["max-new-tokens"],
            sampling=sampling,
            seed=seed,
            echo=values["echo"],
            progress=progress,
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
    if sys.stdout.isatty():
        print()


def _read_prompt(file: str | None, arguments: list[str]) -> str:
    """The text of the one source that is given."""
    sources = [*arguments, *([] if file is None else [file])]
    if len(sources) != 1:
        raise UsageError(
            "expected one text in quotes, --file PATH or - for standard input, "
            f"got {len(sources)}"
        )
    if sources[0] == STANDARD_INPUT:
        data = sys.stdin.buffer.read()
    elif file is not None:
        data = Path(file).read_bytes()
    else:
        return sources[0]
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{sources[0]}: not UTF-8 text: {error}") from error


class _ProgressBar:
    """A bar on standard error while a long prompt is read."""

    def __init__(self):
        self._bar: Any = None

    def __call__(self, read: int, total: int) -> None:
        if self._bar is None and total > LONG_PROMPT:
            import tqdm

            self._bar = tqdm.tqdm(
                total=total, desc="reading", unit="token", unit_scale=True, leave=False
            )
        if self._bar is not None:
            self._bar.update(read - self._bar.n)
            if read == total:
                self._bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()
