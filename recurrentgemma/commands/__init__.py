"""Sub-commands of `recurrentgemma`: parse, call, show; no logic lives here.

A command is a file here and a line in `recurrentgemma.cli.COMMANDS`. It has

    USAGE, DETAILS                 what `--help` shows, besides the flags
    define_flags(values)           defines its flags in an absl FlagValues
    run(values, arguments)         runs: values by flag name, and what is no flag

and raises `UsageError` for a wrong command line, `ValueError` or `OSError` for the rest.
What is heavy is imported when it is needed, so that help comes at once. Flags that
several commands have are defined in `_shared.py`.
"""


class UsageError(Exception):
    """The command line is wrong."""


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
