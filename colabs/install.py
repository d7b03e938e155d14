"""Installs the project from its clone without changing anything that is there.

    python colabs/install.py

The first cell of each notebook runs this file where the package is missing. Replacing
the jax of a Colab or of a Kaggle breaks its GPU and TPU plugins, so every package that
is installed is a constraint at its own version; `constraints.txt` adds versions for
packages that are missing. The versions are checked first, by the clone's own code.
"""

import importlib
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "colabs" / "constraints.txt"


def constraints() -> list[str]:
    """`name==version` of every installed package, and of those in constraints.txt that
    are not installed."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for distribution in importlib.metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.version
        if name and version and version[0].isdigit():  # else its metadata is broken
            pins[name.lower().replace("_", "-")] = version
    return [f"{name}=={version}" for name, version in pins.items()]


def install() -> None:
    """Checks the versions and installs the clone.

    Raises:
      Unsuitable: Python or a package is too old, or pip fails; the sentence says which.
    """
    _forget_package()
    sys.path.insert(0, str(ROOT))
    try:
        from recurrentgemma import environment
    finally:
        sys.path.remove(str(ROOT))
    environment.check_versions()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(constraints()), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint"]
        done = subprocess.run(
            [*pip, str(file), str(ROOT)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line] or ["no message"]
        raise environment.Unsuitable(
            f"pip: expected to install the project, got exit status {done.returncode} "
            f"({errors[-1]}); run python colabs/install.py in a terminal to see more"
        )
    _forget_package()


def _forget_package() -> None:
    """The next import looks for the package again: before, it was the clone's, or a
    folder of that name."""
    for name in list(sys.modules):
        if name.split(".")[0] == "recurrentgemma":
            del sys.modules[name]
    importlib.invalidate_caches()


if __name__ in ("__main__", "install"):  # as the notebooks name it
    install()
