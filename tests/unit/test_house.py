"""The house plan as tests: one way through the modules, and no distribution or vendor in Python."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from imagebuild.load import Catalogue, shipped

REPOSITORY = Path(__file__).parent.parent.parent
PACKAGE = REPOSITORY / "imagebuild"

# What may be named: the default, the first offers, and the systems that `doctor` was tested on.
ALLOWED = {
    ("load.py", "debian"): "DEFAULT_BASE",
    ("starter.py", "centos"): "FIRST_OFFER",
    ("starter.py", "nvidia"): "FIRST_VENDOR",
    ("doctor.py", "debian"): "TESTED",
}


def test_imports_point_one_way() -> None:
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    assert tool, "lint-imports is a test dependency (pip install imgbuild[test])"
    found = subprocess.run([tool, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:]


def _names() -> set[str]:
    catalogue = Catalogue((shipped(),))
    vendors = {vendor for base in catalogue.bases() for vendor in catalogue.vendors(base)}
    return {*catalogue.bases(), *vendors, *catalogue.layers()} - {"none"}


def _strings(path: Path) -> list[tuple[ast.Constant, str]]:
    """Every text of a module that is no docstring, with the name it is assigned to, if any."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    owner: dict[int, str] = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name):
            owner |= {id(inner): target.id for inner in ast.walk(node)}
    return [
        (node, owner.get(id(node), ""))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_module_names_no_distribution_vendor_or_layer(path: Path) -> None:
    names = _names()
    assert {"debian", "centos", "nvidia", "amd", "zfs"} <= names
    for node, assigned_to in _strings(path):
        if node.value in names:
            allowed = ALLOWED.get((path.name, str(node.value)))
            assert allowed is not None and assigned_to == allowed, (
                f"{path.name}:{node.lineno} names {node.value!r}"
            )


def test_only_one_module_catches_our_errors_to_exit() -> None:
    for path in PACKAGE.glob("*.py"):
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit", "os._exit")
        ]
        assert not calls or path.name == "cli.py", path.name


def test_every_shipped_file_is_in_the_wheel() -> None:
    import tomllib

    config = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    included = config["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert set(included) == {"base", "layers", "Containerfile.tmpl"}
    assert config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["imagebuild"]
