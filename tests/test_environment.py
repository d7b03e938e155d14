"""One report of what a notebook runs on, or one sentence of what is missing."""

import importlib.metadata
import re
import sys
from pathlib import Path

import jax
import pytest

from recurrentgemma import environment
from recurrentgemma.environment import Unsuitable, check, check_versions

SETUP = Path(__file__).parents[1] / "setup.py"


def sentence(error) -> str:
    """What a notebook shows, which is one line that ends the cell."""
    [line] = error.value._render_traceback_()
    assert line == str(error.value) and "\n" not in line
    assert re.fullmatch(r"\w+: expected .+, got .+; .+", line)
    return line


def pretend_version(monkeypatch, name, version):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda n: version if n == name else real(n)
    )


def test_report():
    report = check("cpu", needs=["json"])
    device, versions, dtype = report.splitlines()
    assert re.fullmatch(r"device: +CPU, \d+ cores", device)
    assert f"jax {jax.__version__}," in versions
    assert dtype.endswith("float32")
    assert check() == report


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_no_accelerator(accelerator):
    with pytest.raises(Unsuitable) as error:
        check(accelerator)
    assert f"expected a {accelerator.upper()}, got only a CPU" in sentence(error)


def test_unknown_accelerator():
    with pytest.raises(ValueError, match="^accelerator: expected one of any, cpu, gpu"):
        check("T4")


def test_jax_that_cannot_start(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu':\nnone found")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(Unsuitable) as error:
        check("tpu")
    assert "Unable to initialize backend 'tpu': none found" in sentence(error)


@pytest.mark.parametrize(
    "name, version, is_old",
    [
        ("jax", "0.7.1", True),
        ("jax", "0.4.38", True),
        ("jax", "0.7.2", False),
        ("jax", "0.10.0.dev20260101", False),
        ("jax", "1.0", False),
        ("flax", "0.11.1", True),
        ("flax", "0.12.0", False),
    ],
)
def test_old_packages(monkeypatch, name, version, is_old):
    pretend_version(monkeypatch, name, version)
    if not is_old:
        return check_versions()
    with pytest.raises(Unsuitable) as error:
        check()
    assert f"{name}: expected " in sentence(error)
    assert f"got {version};" in sentence(error)


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    monkeypatch.setattr(sys, "version", "3.10.12 (main)")
    with pytest.raises(Unsuitable) as error:
        check()
    assert "Python: expected 3.11 or newer, got 3.10.12" in sentence(error)


def test_missing_module():
    with pytest.raises(Unsuitable) as error:
        check(needs=["json", "no_such_module"])
    assert "%pip install no_such_module" in sentence(error)


def test_a_package_that_is_not_installed_passes(monkeypatch):
    monkeypatch.setattr(environment, "OLDEST_PACKAGES", {"no-such-package": "1.0"})
    check_versions()


def test_oldest_versions_are_those_of_the_metadata():
    setup = SETUP.read_text(encoding="utf-8")
    for name, version in environment.OLDEST_PACKAGES.items():
        assert f'"{name}>={version}"' in setup
    python = ".".join(map(str, environment.OLDEST_PYTHON))
    assert f'python_requires=">={python}"' in setup
