"""One way to start every benchmark: `python -m recurrentgemma.benchmarks NAME`.

A benchmark is a module of this folder with a name in `BENCHMARKS`: its docstring says
what it measures, `add_arguments(parser)` adds its options, and `run(options)` measures
and reports; `options.output` is the path of its JSON document.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurrentgemma.benchmarks.report import RESULTS

BENCHMARKS = (
    "versus",
    "throughput",
    "speculation",
    "long_text",
    "scan",
    "scan_estimates",
    "nano_card",
    "pictures",
)


def add_commands(parsers: Any) -> None:
    """Adds a command for each benchmark, with `run` among its defaults.

    Args:
      parsers: What `ArgumentParser.add_subparsers` returned.
    """
    # A package that is installed has no folder of results.
    folder = RESULTS if RESULTS.is_dir() else Path()
    for name in BENCHMARKS:
        module = importlib.import_module(f"recurrentgemma.benchmarks.{name}")
        description = str(module.__doc__)
        command = parsers.add_parser(
            name,
            help=description.splitlines()[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--output",
            type=Path,
            default=folder / f"{name}.json",
            help="the JSON document",
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m recurrentgemma.benchmarks")
    add_commands(parser.add_subparsers(metavar="NAME", required=True))
    options = parser.parse_args(arguments)
    options.run(options)
