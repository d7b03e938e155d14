"""The Python of the README and of docstrings runs as it is written.

A tiny model stands for every model that an example loads, and the files that a reader
would have, such as `book.txt`, lie in the working directory.
"""

import doctest
import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recurrentgemma
from recurrentgemma.training import whole_rows
from tests.generation.test_sampler import GOLDEN, Tokenizer
from tests.golden_models import load_golden
from tests.test_imports import ROOT, module_files

TEXT = "def add(first, second):\n    return first + second\n"


def docstring_examples() -> dict[str, tuple[str, dict[str, Any]]]:
    """The statements of each docstring that has examples, and what its module names."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for path in module_files():
        if ">>> " not in path.read_text(encoding="utf-8"):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for test in finder.find(importlib.import_module(name)):
            assert not any(example.want for example in test.examples), test.name
            if test.examples:
                source = "".join(e.source for e in test.examples)
                found[test.name] = source, test.globs
    return found


DOCSTRINGS = docstring_examples()


@pytest.fixture(scope="module")
def loaded():
    return load_golden(GOLDEN), Tokenizer(GOLDEN / "tokenizer.model")


@pytest.fixture
def names(loaded, tmp_path, monkeypatch):
    """What a reader of an example has: public names, a model, files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT * 4, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def "}\n', encoding="utf-8")
    model, tokenizer = loaded
    tokens = jnp.array([tokenizer.encode(TEXT)])
    return {
        **{name: getattr(recurrentgemma, name) for name in recurrentgemma.__all__},
        "load": lambda name, **_: loaded,
        "jax": jax,
        "jnp": jnp,
        "model": model,
        "tokenizer": tokenizer,
        "sampler": recurrentgemma.Sampler(model, tokenizer),
        "tokens": tokens,
        "cache": model.init_cache(1),
        "batch": whole_rows(tokens),
        "batches": [np.asarray(tokens)],
        "questions": ["def ", "import "],
        "patch": jnp.zeros_like,
    }


def run(source: str, names: dict[str, object]) -> dict[str, object]:
    """Runs a script; the names that it may use, and those that it then has."""
    Path("example.py").write_text(source, encoding="utf-8")
    return runpy.run_path("example.py", names)


def test_there_are_examples():
    assert "recurrentgemma.generation.sampler.Sampler" in DOCSTRINGS


@pytest.mark.filterwarnings("ignore:This model does not end its turns")
@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("name", DOCSTRINGS)
def test_docstring(name, names):
    source, module = DOCSTRINGS[name]
    run(source, {**module, **names})


@pytest.mark.filterwarnings("ignore:This model does not end its turns")
@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.slow
def test_readme(names):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        names = run(block, names)
