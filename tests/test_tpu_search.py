"""Commands look for no TPU where there is none, and print nothing of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recurrentgemma import _tpu_search

ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'recurrentgemma[tpu-plan]'",
)
VARIABLES = {*_tpu_search.NO_CHIP, *_tpu_search.COMPILER_ONLY, "JAX_PLATFORMS"}


def run(arguments, folder):
    """What a process prints on standard error, nothing of TPUs in its environment."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**kept, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stderr


@needs_libtpu
def test_jax_starts_quietly(tmp_path):
    code = (
        "from recurrentgemma import _tpu_search; _tpu_search.skip(); "
        "import jax; jax.devices()"
    )
    assert run(["-c", code], tmp_path) == ""


@needs_libtpu
@pytest.mark.slow
def test_a_command_is_quiet(tmp_path):
    command = ["-m", "recurrentgemma", "sample", "a", "--max-new-tokens=1"]
    assert run(command, tmp_path) == ""


@pytest.fixture
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.find_spec("jax")
    monkeypatch.setattr(_tpu_search.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(_tpu_search, "CHIPS", ("no-such-device*",))
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def test_what_the_user_set_stays(no_variables, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "worker-0")
    _tpu_search.skip()
    assert "TPU_ACCELERATOR_TYPE" not in os.environ


def test_a_chip_is_looked_for_where_there_is_one(no_variables, monkeypatch):
    monkeypatch.setattr(_tpu_search, "CHIPS", ("null",))
    _tpu_search.skip()
    assert not _tpu_search.NO_CHIP.keys() & os.environ.keys()


def test_without_a_chip_nothing_is_looked_for(no_variables):
    _tpu_search.skip()
    assert _tpu_search.NO_CHIP.keys() <= os.environ.keys()
    assert "JAX_PLATFORMS" not in os.environ
