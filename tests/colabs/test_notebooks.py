"""Every notebook runs from top to bottom, offline, and holds its present outputs."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

import nbformat
from nbclient.exceptions import CellExecutionError

from colabs import run

ROOT = Path(__file__).parents[2]
OFFLINE = Path(__file__).parent / "offline"
MAX_BYTES = 1_000_000
MACHINE_PATH = re.compile(
    r"(?<![\w.:/<])/(?:tmp|root|home|work|mnt|var|opt|usr|content|kaggle|Users)/\w"
)
NOTEBOOKS = pytest.mark.parametrize("path", run.paths(), ids=lambda path: path.stem)


def kernel_environment(*, fast: bool) -> dict[str, str]:
    """One CPU device, this checkout, no network; quick compilation if fast."""
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(OFFLINE), str(ROOT)]),
    }
    if not fast:  # what they would take in a Colab
        variables.pop("XLA_FLAGS", None)
    return variables


def execute(notebook, *, fast=True):
    variables = kernel_environment(fast=fast)
    return run.execute(notebook, fast=fast, environment=variables)


def read(path):
    return nbformat.read(path, as_version=4)


def one_cell(source):
    cell = nbformat.v4.new_code_cell(source)
    return nbformat.v4.new_notebook(cells=[cell])


def outputs(notebook):
    return [output for cell in run.code_cells(notebook) for output in cell.outputs]


def text_of(output) -> str:
    """All text that a reader of the output or of its file may see."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join(output.traceback)
    return "\n".join(
        value for kind, value in output.data.items() if not kind.startswith("image/")
    )


def test_there_are_notebooks():
    known = {"evaluation", "griffin_tour", "long_context_throughput", "sampling"}
    assert known <= {path.stem for path in run.paths()}


@NOTEBOOKS
def test_short_form(path):
    executed = execute(read(path))
    assert not [o for o in outputs(executed) if getattr(o, "name", "") == "stderr"]


@pytest.mark.slow
@NOTEBOOKS
def test_whole_form(path):
    executed = execute(read(path), fast=False)
    shown, committed = outputs(executed), outputs(read(path))
    assert [o.output_type for o in shown] == [o.output_type for o in committed]


@NOTEBOOKS
def test_outputs_are_of_the_present_source(path):
    notebook = read(path)
    recorded = [cell.metadata.get(run.DIGEST) for cell in run.code_cells(notebook)]
    assert recorded == run.digests(notebook), f"run: python colabs/run.py {path.stem}"
    counts = [cell.execution_count for cell in run.code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@NOTEBOOKS
def test_outputs_are_small_and_name_no_machine(path):
    assert path.stat().st_size < MAX_BYTES
    for output in outputs(read(path)):
        text = text_of(output)
        assert output.output_type != "error", text
        assert not MACHINE_PATH.search(text), text


@NOTEBOOKS
def test_badge_and_first_cell_are_the_common_ones(path):
    notebook = read(path)
    found = notebook.cells[0].source, run.code_cells(notebook)[0].source
    assert found == run.common_cells(notebook, path.name), "run: python colabs/run.py"
    assert f"/blob/main/colabs/{path.name})" in found[0]


def test_every_notebook_is_in_the_list():
    listed = re.findall(r"\]\((\w+\.ipynb)\)", (run.FOLDER / "README.md").read_text())
    assert sorted(listed) == [path.name for path in run.paths()]


def test_the_address_stands_in_one_place():
    owner = run.REPOSITORY.removeprefix("https://github.com/").split("/")[0]
    files = [path for path in run.FOLDER.iterdir() if path.suffix in (".py", ".md")]
    holding = [path.name for path in files if f"/{owner}/" in path.read_text()]
    assert holding == ["run.py"]


def test_digests_notice_edits_deletions_and_another_order():
    source = ["a = 1", "b = 2", "print(a)"]
    known = run.digests(nbformat.v4.new_notebook(cells=_cells(source)))
    assert len(set(known)) == 3
    for other in (["a = 1", "b = 3", "print(a)"], source[1:], source[::-1]):
        changed = run.digests(nbformat.v4.new_notebook(cells=_cells(other)))
        assert changed[-1] not in known


def _cells(sources):
    return [nbformat.v4.new_code_cell(source) for source in sources]


def test_machine_paths_are_found():
    for text in ('File "/root/x.py"', "saved in /tmp/a", "/home/me/file"):
        assert MACHINE_PATH.search(text), text
    for text in ("https://a.b/home/c", "a/tmp/b", "</tmp>", "/tmp"):
        assert not MACHINE_PATH.search(text), text


def test_what_a_kernel_may_and_may_not_do():
    """The guards of this file work: no network, one device, a short form."""
    source = """
import jax, os, socket, urllib.request
for reach in (
    lambda: urllib.request.urlopen("http://example.com"),
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: socket.socket().connect(("192.0.2.1", 80)),
):
    try:
        reach()
    except RuntimeError as error:
        print(error)
print(len(jax.devices()), os.environ.get("RECURRENTGEMMA_FAST"))
"""
    [shown] = outputs(execute(one_cell(source)))
    assert len(re.findall("a notebook tried to", shown.text)) == 3
    assert shown.text.endswith("1 1\n")


OLD_JAX = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.4.38" if name == "jax" else real(name)
"""
NO_PLOTS = """
import sys
sys.modules["matplotlib"] = None
"""


@pytest.mark.parametrize(
    "accelerator, before, sentence",
    [
        ("gpu", "", "accelerator: expected a GPU, got only a CPU; choose one in a Col"),
        (
            "any",
            OLD_JAX,
            "jax: expected 0.7.2 or newer, got 0.4.38; choose a newer run",
        ),
        ("any", NO_PLOTS, "matplotlib: expected it to be installed, as this notebook"),
    ],
    ids=["no accelerator", "old runtime", "missing package"],
)
def test_the_first_cell_stops_with_one_sentence(accelerator, before, sentence):
    notebook = read(run.FOLDER / "long_context_throughput.ipynb")
    source = run.code_cells(notebook)[0].source
    chosen = source.replace('ACCELERATOR = "any"', f'ACCELERATOR = "{accelerator}"')
    failing = one_cell(before + chosen)
    with pytest.raises(CellExecutionError) as error:
        execute(failing)
    shown = error.value.traceback.split("------------------\n")[-1].strip()
    assert shown.startswith(sentence)
    assert "\n" not in shown
