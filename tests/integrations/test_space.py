"""The folder of a Hugging Face Space: complete when its README's commands have run, and it serves the page."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "integrations" / "space"


@pytest.fixture
def space(tmp_path):
    """A Space's repository, made as the README says."""
    block = re.search(r"```text\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    for line in block[1].splitlines():
        subprocess.run(line.replace("SPACE", shlex.quote(str(tmp_path))), shell=True, check=True, cwd=ROOT)
    return tmp_path


@pytest.fixture
def app(space, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "studio", raising=False)
    spec = importlib.util.spec_from_file_location("space_app", space / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("studio", None)


def test_its_card_names_what_is_there(space):
    card = dict(re.findall(r"^(\w+): (.+)$", (space / "README.md").read_text().split("---")[1], re.MULTILINE))
    assert card["sdk"] == "gradio" and (space / card["app_file"]).is_file()
    assert card["license"] == "apache-2.0" and len(card["short_description"]) <= 60
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = (space / "requirements.txt").read_text()
    assert set(re.findall(r"ras_compile\[(\w+)\]", required)) <= set(known["optional-dependencies"])
    assert re.search(r"^ras_compile\[app\] @ git\+", required, re.MULTILINE)
    lowest = re.search(r"gradio>=(\d+)", " ".join(known["optional-dependencies"]["app"]))[1]
    assert int(card["sdk_version"].split(".")[0]) >= int(lowest)


def test_its_variables_are_the_arguments_of_the_page(app, monkeypatch):
    assert app.arguments() == []
    monkeypatch.setenv("MODEL", "folder")
    monkeypatch.setenv("INNER_BACKEND", "eager")
    assert app.arguments() == ["--pipeline", "folder", "--inner-backend", "eager"]


def test_it_serves_the_page(app, space):
    pytest.importorskip("gradio", reason="needs Gradio: pip install '.[app]'")
    page = app.page()
    assert Path(page.__file__) == space / "page.py" and page.SHIPPED.is_dir()
    blocks = page.main(["--inner-backend", "eager"], prevent_thread_lock=True, quiet=True)
    try:
        assert b"Region-adaptive sampling" in urllib.request.urlopen(blocks.local_url).read()
    finally:
        blocks.close()
