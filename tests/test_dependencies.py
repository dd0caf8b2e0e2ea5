"""What the package asks for, and what it ships: ranges that hold, every folder of code, nothing unpickled from disk."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("ras_compile", "passes", "kernels")
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.load", "torch.package"}


def asked() -> Iterator[Requirement]:
    yield from map(Requirement, PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        yield from map(Requirement, extra)


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split(";")[0].strip().lower().split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("needed", PROJECT["project"]["dependencies"])
def test_what_is_needed_has_a_lower_bound(needed):
    """An old version would be taken, and fail in the middle of a run."""
    assert any(bound.operator in (">=", "~=") for bound in Requirement(needed).specifier)


def test_nothing_is_kept_from_newer_versions():
    """An upper bound makes two packages that work together uninstallable; what is tried together is in constraints.txt."""
    bounds = {str(needed): {bound.operator for bound in needed.specifier} for needed in asked()}
    assert not {name: found for name, found in bounds.items() if found - {">=", "!="}}


def test_what_is_installed_lies_within_the_ranges():
    for needed in asked():
        if needed.marker is not None and not needed.marker.evaluate():
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            continue  # of an extra that is not installed
        assert needed.specifier.contains(found, prereleases=True), f"{needed.name} {found} for {needed}"


def test_what_is_tried_together_lies_within_the_ranges():
    known = pinned()
    for needed in asked():
        if needed.name.lower() in known:
            assert needed.specifier.contains(known[needed.name.lower()]), needed


def test_every_folder_of_code_is_shipped():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            name = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
            found.add(name if name.startswith("ras_compile") else f"ras_compile.{name}")
    assert listed == found


def loads(source: str) -> list[str]:
    """Names in a source by which objects come out of a file as code."""
    tree = ast.parse(source)
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                found += [module, *(f"{module}.{alias.name}" for alias in names)]
            case ast.Attribute():
                found.append(ast.unparse(node))
    return [name for name in found if name in UNPICKLING]


# What `load` reads: a folder of compiled code, which its docstring says to trust, and PyTorch's guards within.
TRUSTED = {"ras_compile/capture/on_disk.py", "ras_compile/_torch.py"}


def test_nothing_is_unpickled():
    """Who can write into a cache's folder must not be able to run code by it: caches are JSON, and checked (test_tiles.py)."""
    found = {path: loads(path.read_text()) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert {path.relative_to(ROOT).as_posix() for path, names in found.items() if names} == TRUSTED


@pytest.mark.parametrize(
    "line", ["import pickle", "from pickle import loads", "x = torch.load(path)", "from torch import load"]
)
def test_unpickling_is_seen(line):
    assert loads(line)
