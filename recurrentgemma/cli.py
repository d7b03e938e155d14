"""The `recurrentgemma` command: finds the sub-command and reports its errors.

A sub-command is a module of `recurrentgemma.commands` and a line in `COMMANDS`. A
caller's mistake is one line on standard error and exit status 1, or 2 if the command
line itself is wrong; Ctrl-C and a closed pipe end the process at once and quietly.
"""

import importlib
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import flags

from recurrentgemma import __version__, _tpu_search
from recurrentgemma.commands import UsageError, _compilation_cache, one_line

PROGRAM = "recurrentgemma"
COMMANDS = {
    "sample": "continue a text",
    "chat": "talk with an instruction-tuned model",
    "score": "show how probable a text is",
    "prefill": "read a text once, to continue from it often",
    "batch": "continue all prompts of a JSONL file",
    "eval": "evaluate a model on questions, needles, harness tasks or a model card",
    "train": "train a model, new or loaded",
    "tune": "learn a prefix that a kind of text begins with",
    "info": "show the config, parameters and memory of a model",
    "convert": "write a checkpoint in another layout",
    "verify": "check a checkpoint and print a certificate",
    "bench": "measure speed and memory",
    "heads": "show which attention heads find a fact in a long text",
    "plan": "compile for a TPU without one: does it fit, and what bounds its time",
}
CLEANING_UP = ("train", "convert", "verify")
"""Commands that save, or remove what is half-written, when Ctrl-C ends them. Others do
so only while they write a file (see `commands._shared.ctrl_c_raises`)."""

EXIT_FAILED = 1
EXIT_USAGE = 2
# What a shell shows for a process that SIGINT or SIGPIPE ended.
EXIT_INTERRUPTED = 128 + 2
EXIT_CLOSED_PIPE = 128 + 13

HELP_FLAGS = {"--help", "-h", "-help"}
MAX_HELP_WIDTH = 88
HELP_INDENT = 22


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Args:
      argv: arguments after the program's name; None takes those of the process, whose
        signals are then set too.

    Returns:
      The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and (closed := _open_closed_streams()):
        return _fail(closed, EXIT_FAILED)
    if not arguments or arguments[0] in HELP_FLAGS | {"help"}:
        print(_overview())
        return 0 if arguments else EXIT_USAGE
    name, *rest = arguments
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        return _fail(
            f"unknown command {name!r}; expected {', '.join(COMMANDS)}", EXIT_USAGE
        )
    if argv is None:
        _let_signals_end_the_process(cleans_up=name in CLEANING_UP)
        _compilation_cache.enable()
        _tpu_search.skip()
    status = _run(name, rest)
    if argv is None:
        _forget_unwritten_output()
    return status


def _run(name: str, arguments: list[str]) -> int:
    try:
        command: Any = importlib.import_module(f"recurrentgemma.commands.{name}")
        if arguments and arguments[0] in getattr(command, "SUB_COMMANDS", ()):
            name, command = f"{name} {arguments[0]}", command.sub_command(arguments[0])
            arguments = arguments[1:]
        values = flags.FlagValues()
        command.define_flags(values)
        normal = _normalize(values, arguments)
        if normal is None:
            print(_help(name, command, values))
        else:
            values.set_gnu_getopt(True)
            others = values([PROGRAM, *normal])[1:]
            command.run(values.flag_values_dict(), others)
        sys.stdout.flush()
    except (UsageError, flags.Error) as error:
        hint = f"see {PROGRAM} {name} --help"
        return _fail(f"{name}: {one_line(error)} ({hint})", EXIT_USAGE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_CLOSED_PIPE
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return _fail(f"{name}: {one_line(error)}", EXIT_FAILED)
    return 0


def _let_signals_end_the_process(*, cleans_up: bool) -> None:
    # Python would notice them only after a compilation or a block of steps.
    if not cleans_up:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _open_closed_streams() -> str | None:
    """Gives standard streams that are closed a place, so that no file takes theirs.

    Returns:
      What to say if the output would be lost; None if nothing would.
    """
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return "standard output is closed; redirect it to /dev/null to do without it"
    return None


def _forget_unwritten_output() -> None:
    """What could not be written, and was told, would be tried and told again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _fail(message: str, status: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _normalize(values: flags.FlagValues, arguments: list[str]) -> list[str] | None:
    """The arguments with flags spelled as they are defined; None asks for help.

    A flag may have `_` for `-` in its name and its value in the next argument, which is
    then never taken for a flag.
    """
    normal, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*normal, argument, *rest]
        if argument in HELP_FLAGS:
            return None
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            name = flag.removeprefix("--").replace("_", "-")
            argument = f"--{name}{equals}{value}"
            takes_value = name in values and not values[name].boolean
            if takes_value and not equals and (value := next(rest, None)) is not None:
                argument = f"--{name}={value}"
        normal.append(argument)
    return normal


def _overview() -> str:
    lines = [f"Usage: {PROGRAM} COMMAND [FLAGS]", ""]
    lines += [f"  {name:9}{summary}" for name, summary in COMMANDS.items()]
    lines += ["", f"{PROGRAM} COMMAND --help shows the flags of a command."]
    return "\n".join(lines)


def _help(name: str, command: Any, values: flags.FlagValues) -> str:
    width = min(shutil.get_terminal_size().columns, MAX_HELP_WIDTH)
    lines = [f"Usage: {PROGRAM} {name} {command.USAGE}", ""]
    lines += [*textwrap.wrap(command.DETAILS, width), ""]
    if hasattr(command, "SUB_COMMANDS"):
        rows = command.SUB_COMMANDS.items()
        return "\n".join(lines + [f"  {sub:16}{summary}" for sub, summary in rows])
    lines.append("Flags:")
    for flag_name in values:
        flag = values[flag_name]
        title = f"  --[no]{flag_name}" if flag.boolean else f"  --{flag_name}"
        shown = flag.default
        if isinstance(shown, list):
            shown = ",".join(shown)
        default = "" if shown in (None, "") else f" (default: {shown})"
        text = textwrap.wrap(f"{flag.help}{default}", width - HELP_INDENT)
        if len(title) < HELP_INDENT and text:
            title = f"{title:{HELP_INDENT}}{text.pop(0)}"
        lines += [title, *(" " * HELP_INDENT + line for line in text)]
    return "\n".join(lines)
