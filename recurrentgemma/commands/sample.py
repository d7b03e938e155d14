"""`recurrentgemma sample`: continues a text."""

import sys
from typing import Any

from absl import flags

from recurrentgemma.commands import _shared

USAGE = '[TEXT | - | --file PATH] [FLAGS]     for example: sample "def "'
DETAILS = (
    "Continues a text and prints what the model writes as it writes it; several samples "
    "come when all are written. The memory does not depend on how long the text "
    "becomes. A text that begins with a dash goes after --."
)

SEPARATOR = "-" * 20


def define_flags(values: flags.FlagValues) -> None:
    _shared.define_model(values)
    _shared.define_variant(values)
    _shared.define_text(values)
    _shared.define_generation(values, max_new_tokens=200)
    _shared.define_stop(values)
    flags.DEFINE_integer(
        "num-samples",
        1,
        "texts to write, with the seeds that follow",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_boolean("echo", False, "print the text first", flag_values=values)


def run(values: dict[str, Any], arguments: list[str]) -> None:
    settings = _shared.generation_settings(values)
    text = _shared.find_text(
        values, arguments, may_be_none=values["prefix"] is not None
    )
    prompt = text if isinstance(text, str) else "".join(text)
    sampler, prefix = _shared.load_sampler(values)
    opening = prompt if values["echo"] else ""
    count = values["num-samples"]
    with _shared.reading_bar() as progress:
        settings |= {"prefix": prefix, "progress": progress}
        if count == 1:
            _show(opening, sampler.stream(prompt, **settings))
        else:
            samples = sampler([prompt], num_samples=count, **settings)
            texts = (opening + sample.text for sample in samples)
            sys.stdout.write(f"\n{SEPARATOR}\n".join(texts))
    if count > 1 or sys.stdout.isatty():
        print()


def _show(opening: str, pieces) -> None:
    """Prints the pieces as they come, after the opening."""
    for piece in pieces:
        sys.stdout.write(opening + piece)
        sys.stdout.flush()
        opening = ""
    sys.stdout.write(opening)
