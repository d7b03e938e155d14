"""What is installed stays as it is; what fails is one sentence."""

import importlib.metadata
import subprocess
from types import SimpleNamespace

import pytest

from colabs import install
from recurrentgemma.environment import OLDEST_PACKAGES, Unsuitable

FOLDER = install.ROOT / "colabs"


def pins(name):
    lines = (FOLDER / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def distribution(name, version):
    return SimpleNamespace(metadata={"Name": name}, version=version)


@pytest.fixture
def pip(monkeypatch):
    """Pip that writes down its constraints and succeeds, or not."""
    calls = SimpleNamespace(constraints=[], targets=[], status=0, stderr="")

    def run(command, **_):
        with open(command[command.index("--constraint") + 1]) as file:
            calls.constraints.append(file.read().splitlines())
        calls.targets.append(command[-1])
        return SimpleNamespace(returncode=calls.status, stderr=calls.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    # The package of the tests must not be imported a second time.
    monkeypatch.setattr(install, "_forget_package", lambda: None)
    return calls


def test_everything_installed_is_a_constraint(monkeypatch, pip):
    installed = [
        distribution("jax", "0.7.2"),
        distribution("Ml_Dtypes", "0.6.0"),
        distribution("torch", "2.11.0+cu128"),
        distribution(None, None),
        distribution("broken", "unknown"),
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: installed)
    install.install()
    expected = {"jax==0.7.2", "ml-dtypes==0.6.0", "torch==2.11.0+cu128"}
    missing = {
        f"{name}=={version}" for name, version in pins("constraints.txt").items()
    }
    assert set(pip.constraints[0]) == expected | missing
    assert pip.targets == [str(install.ROOT)]


def test_what_is_installed_wins(monkeypatch):
    name = next(iter(pins("constraints.txt")))
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda: [distribution(name, "99.0")]
    )
    assert install.constraints() == [f"{name}==99.0"]


def test_pip_fails(pip):
    pip.status, pip.stderr = 1, "Collecting\nERROR: no matching distribution\n\n"
    with pytest.raises(Unsuitable, match="^pip: expected .+, got .+; run ") as error:
        install.install()
    assert "(ERROR: no matching distribution)" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_old_jax_stops_before_pip(monkeypatch, pip):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.6.0")
    with pytest.raises(Unsuitable, match="^jax: expected 0.7.2 or newer, got 0.6.0;"):
        install.install()
    assert pip.targets == []


def test_the_replica_has_the_oldest_versions_and_lacks_what_is_added():
    replica = pins("replica.txt")
    assert OLDEST_PACKAGES.items() <= replica.items()
    assert not replica.keys() & pins("constraints.txt").keys()
