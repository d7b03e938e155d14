"""Executes the notebooks of this folder and stores their outputs.

    python colabs/run.py [NAME ...]

Each notebook gets the badge and the first code cell from here, which are alike in all
of them, is executed from top to bottom in this folder, and is written back with its
outputs. Every code cell then records a digest of its source and of all code before it:
outputs whose digest does not fit are not those of the present source.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

REPOSITORY = "https://github.com/OWNER/recurrentgemma"
"""Where git finds the project: the only place to change, then run this file."""

FOLDER = Path(__file__).resolve().parent
FAST = "RECURRENTGEMMA_FAST"
"""Environment variable that makes the notebooks' sizes small."""
DIGEST = "digest_of_source"
CELL_TIMEOUT_S = 600

_BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/colabs/{name})"
)
_FIRST_CELL = """\
REPOSITORY = "{repository}"  # where git finds the project
ACCELERATOR = "any"  # "cpu", "gpu" or "tpu": stop here if it is missing

try:
    from recurrentgemma import environment
except ImportError:
    import runpy
    from pathlib import Path

    scripts = [Path(p, "colabs/install.py") for p in ("..", ".", "recurrentgemma")]
    if not any(script.exists() for script in scripts):
        !git clone --quiet --depth 1 {{REPOSITORY}} recurrentgemma
    script = next((script for script in scripts if script.exists()), None)
    if script is None:
        raise SystemExit(f"REPOSITORY: git cannot clone {{REPOSITORY}}") from None
    runpy.run_path(str(script), run_name="install")
    from recurrentgemma import environment
print(environment.check(ACCELERATOR, needs={needs}))"""
_NEEDS = ("matplotlib",)
"""Modules that a notebook may import and that the package does not depend on."""


def paths() -> list[Path]:
    """All notebooks."""
    return sorted(FOLDER.glob("*.ipynb"))


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Its code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def common_cells(notebook: nbformat.NotebookNode, name: str) -> tuple[str, str]:
    """The source of the badge and of the first code cell of the notebook `name`."""
    later = "\n".join(cell.source for cell in code_cells(notebook)[1:])
    return (
        _BADGE.format(
            repository=REPOSITORY.removeprefix("https://github.com/"), name=name
        ),
        _FIRST_CELL.format(
            repository=REPOSITORY,
            needs=json.dumps(
                [n for n in _NEEDS if f"import {n}" in later or f"%{n}" in later]
            ),
        ),
    )


def digests(notebook: nbformat.NotebookNode) -> list[str]:
    """For each code cell, a digest of its source and of all code before it."""
    digest, found = hashlib.sha256(), []
    for cell in code_cells(notebook):
        digest.update(cell.source.encode() + b"\0")
        found.append(digest.hexdigest()[:16])
    return found


def execute(
    notebook: nbformat.NotebookNode,
    *,
    fast: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new kernel, which runs in this folder.

    Args:
      notebook: is not changed.
      fast: whether sizes are small.
      environment: environment variables of the kernel.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.from_dict(notebook)
    variables = {key: value for key, value in environment.items() if key != FAST}
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=variables | ({FAST: "1"} if fast else {}))
    for cell, digest in zip(code_cells(notebook), digests(notebook), strict=True):
        cell.metadata[DIGEST] = digest
    return notebook


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as sampling; all if none")
    chosen = parser.parse_args().names
    for path in paths():
        if chosen and path.stem not in chosen:
            continue
        print(path.name, flush=True)
        notebook = nbformat.read(path, as_version=4)
        badge, first = common_cells(notebook, path.name)
        notebook.cells[0].source = badge
        code_cells(notebook)[0].source = first
        nbformat.write(execute(notebook), path)


if __name__ == "__main__":
    main()
