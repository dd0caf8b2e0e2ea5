"""What is installed: a wheel holds all of the package and nothing else, and says what it is."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import ras_compile

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The folders of the repository, and where a wheel has them.
HOMES = {"ras_compile": "ras_compile", "passes": "ras_compile/passes", "kernels": "ras_compile/kernels"}


def files(folder: str) -> list[str]:
    """Files of a folder of the package, pages and pictures among them."""
    found = [file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return [file.relative_to(ROOT / folder).as_posix() for file in found]


def test_one_version():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and cited[1] == PROJECT["version"]
    assert re.search(rf"^## {re.escape(PROJECT['version'])}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", ras_compile.__version__)


def test_every_package_is_listed():
    """setuptools is given the packages by name, so that a new folder could be forgotten."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        "/".join([home, *file.parent.relative_to(ROOT / folder).parts]).replace("/", ".")
        for folder, home in HOMES.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert sorted(found) == sorted(listed)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs build: pip install build")
def test_wheel(tmp_path):
    for name in [*HOMES, "pyproject.toml", "setup.py", "README.md", "LICENSE"]:  # building leaves things behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    offline = [] if importlib.util.find_spec("setuptools") is None else ["--no-isolation"]
    subprocess.run([sys.executable, "-m", "build", "--wheel", *offline], check=True, capture_output=True, cwd=tmp_path)
    (path,) = (tmp_path / "dist").glob("*.whl")
    check_wheel(path)


def check_wheel(path: Path) -> None:
    """Asserts that a wheel is whole."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        (points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
        said, entries = message_from_bytes(wheel.read(metadata)), wheel.read(points).decode()
    assert names == {f"{home}/{name}" for folder, home in HOMES.items() for name in files(folder)}
    assert "ras_compile/py.typed" in names
    assert "[torch_dynamo_backends]\nras = ras_compile.backend:ras" in entries
    assert said["Version"] == PROJECT["version"] and said["Description-Content-Type"] == "text/markdown"
    assert said["Author"] == PROJECT["authors"][0]["name"] and len(said.get_all("Project-URL", [])) == len(
        PROJECT.get("urls", {})
    )
    shown = said.get_payload()
    assert "# ras_compile" in shown and "pip install" in shown
    assert not re.search(r"\]\((?!https://)", shown), "the index shows no relative link"


def test_the_page_of_the_index_has_absolute_links():
    pytest.importorskip("setuptools", reason="needs setuptools: pip install setuptools")
    page = runpy.run_path(str(ROOT / "setup.py"))["page"]
    text = "![seen](a/b.png)\nabout it\n\n[this](docs/x.md), [that](https://arxiv.org/abs/1)"
    assert page(text, None) == "this, [that](https://arxiv.org/abs/1)"
    home = "https://github.com/ours/it"
    assert page(text, home) == (
        "![seen](https://raw.githubusercontent.com/ours/it/main/a/b.png)\nabout it\n\n"
        f"[this]({home}/blob/main/docs/x.md), [that](https://arxiv.org/abs/1)"
    )
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(rf"\]\({home}/blob/main/([^)#]+)", page(readme, home))
    assert len(targets) > 10 and all((ROOT / target).exists() for target in targets)
