"""Imports point downwards only, and the kernels stand on jax alone."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "recurrentgemma"

# From the bottom to the top. A module may import those of earlier lines, and its own.
LAYERS = [
    {"kernels"},
    {"_compat", "_atomic", "_validation", "_tpu_search", "mixers"},
    {"config"},
    {"chunk", "cache", "matrices"},
    {"observed"},
    {"layers", "rotary", "inputs"},
    {"blocks"},
    {"griffin"},
    {"environment"},
    {"inspect", "cost", "plots"},
    {"tokenizer"},
    {"generation"},
    {"checkpoints"},
    {"adapters"},
    {"training"},
    {"planning"},
    {"evaluation"},
    {"benchmarks"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_files() -> list[Path]:
    # `recurrentgemma/kernels` is a link, which rglob does not follow everywhere.
    ours = {
        path
        for path in PACKAGE.rglob("*.py")
        if "kernels" not in path.relative_to(PACKAGE).parts
    }
    kernels = {
        PACKAGE / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")
    }
    return sorted(ours | kernels)


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, also inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            # `from a import b` may name a module: a.b
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def violations(path: Path) -> list[str]:
    own = layer_of(path)
    found = []
    for name in sorted(imported_modules(path)):
        parts = name.split(".")
        if parts[0] == "kernels":
            found.append(f"imports {name}: it is recurrentgemma.kernels")
        if parts[0] != "recurrentgemma":
            if own == "kernels" and parts[0] not in {"jax", *sys.stdlib_module_names}:
                found.append(f"imports {name}: kernels depend on jax alone")
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        if target in {"__version__", "assets"} or target == own:
            continue
        if RANK.get(target, RANK["__init__"]) >= RANK[own]:
            found.append(f"imports {name}, which is not below {own}")
    return found


@pytest.mark.parametrize("path", module_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    assert layer_of(path) in RANK, f"give {layer_of(path)} a place in LAYERS"
    assert violations(path) == []


def test_layers_name_what_exists():
    existing = {path.stem for path in PACKAGE.iterdir()}
    assert RANK.keys() <= existing


def test_a_violation_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "recurrentgemma")
    for folder in ("kernels", "generation"):
        (tmp_path / "recurrentgemma" / folder).mkdir(parents=True)
    bad = {
        "kernels/scan.py": "import numpy",
        "config.py": "def f():\n    from recurrentgemma.griffin import Griffin",
        "generation/sampling.py": "from recurrentgemma.checkpoints import load",
        "layers.py": "import kernels.linear_scan",
        "cache.py": "import recurrentgemma",
    }
    for name, source in bad.items():
        path = tmp_path / "recurrentgemma" / name
        path.write_text(source)
        assert len(violations(path)) == 1, name


def test_setup_lists_every_package():
    listed = (ROOT / "setup.py").read_text(encoding="utf-8")
    packages = {path.parent for path in module_files() if path.name == "__init__.py"}
    for folder in packages:
        name = folder.name
        assert re.search(rf'[".]{name}"', listed), f"setup.py does not list {folder}"


def file_map() -> list[Path]:
    """The files and folders of the README's map, in its order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("## File map")[1].split("```")[1]
    entries, folders = [], [ROOT]
    for line in block.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"[\w./]+(?:, [\w./]+)*", line.strip())
        assert names, line
        del folders[depth + 1 :]
        found = [folders[-1] / name for name in names[0].split(", ") if name != "..."]
        entries += found
        folders.append(found[0])
    return entries


def test_the_map_names_every_file_and_folder():
    entries = file_map()
    assert [path for path in entries if not path.exists()] == []
    whole = (ROOT / "kernels", PACKAGE, PACKAGE / "generation", PACKAGE / "training")
    for folder in whole:
        parts = {
            p for p in folder.iterdir() if p.suffix in ("", ".py") and p.stem[1] != "_"
        }
        parts -= {folder / "__pycache__", PACKAGE / "kernels"}
        unlisted = [p for p in parts if not any(p in (e, *e.parents) for e in entries)]
        assert unlisted == [], f"the README's file map lacks {unlisted}"


def test_the_map_lists_a_file_after_those_that_it_uses():
    order = [ROOT / "kernels" / "__init__.py", *file_map()]
    rank = {path: i for i, path in enumerate(order)}

    def place(path: Path) -> int | None:
        return next((rank[p] for p in (path, *path.parents) if p in rank), None)

    for path in module_files():
        # The map calls the kernels by their own folder.
        parts = path.relative_to(ROOT).parts
        own = place(ROOT.joinpath(*parts[parts[:2] == ("recurrentgemma", "kernels") :]))
        for name in imported_modules(path):
            target = name.replace("recurrentgemma.kernels", "kernels").split(".")
            used = place(ROOT.joinpath(*target).with_suffix(".py"))
            if used is None or own is None or path.stem[:2] == "__":
                continue
            inside = (
                order[own] in order[used].parents or order[used] in order[own].parents
            )
            assert used <= own or inside, f"the map lists {path} before {name}"
