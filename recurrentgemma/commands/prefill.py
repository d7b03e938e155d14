"""`recurrentgemma prefill`: reads a text once, for all that is to come after it."""

import os
from typing import Any

from absl import flags

from recurrentgemma.commands import UsageError, _shared

USAGE = "[TEXT | - | --file PATH] --output PATH [FLAGS]"
DETAILS = (
    "Reads a text of any length and saves its prefix, from which --prefix of sample, "
    "score and prefill and --load of chat continue without reading the text again. A "
    "file or standard input is read line by line, in memory that does not depend on "
    "its length."
)


def define_flags(values: flags.FlagValues) -> None:
    _shared.define_model(values)
    _shared.define_variant(values)
    _shared.define_text(values)
    flags.DEFINE_string(
        "output", None, "the file of the prefix (required)", flag_values=values
    )


def run(values: dict[str, Any], arguments: list[str]) -> None:
    output = values["output"]
    if output is None:
        raise UsageError("--output is required: the file of the prefix")
    # A text shows its tokens, a file its bytes, of which the number is known before.
    is_file = not arguments or arguments[0] == _shared.STANDARD_INPUT
    with _shared.reading_bar("B" if is_file else "token") as bar:
        text = _shared.find_text(values, arguments, progress=bar)
        _shared.check_target("--output", output)
        sampler, before = _shared.load_sampler(values)
        progress = None if is_file else bar
        prefix = sampler.prefill(text, prefix=before, progress=progress)
    with _shared.ctrl_c_raises():
        prefix.save(output)
    count = int(prefix.num_tokens[0])
    read = f"{count:,} tokens"
    if before is not None:
        read = f"{count - int(before.num_tokens[0]):,} tokens after the prefix, {read}"
    print(f"{output}: {read}, {os.path.getsize(output):,} bytes")
