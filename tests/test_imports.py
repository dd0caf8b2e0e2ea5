"""What an import costs, by what it brings along. Who may import whom is import-linter's: see pyproject.toml."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ras_compile

ROOT = Path(__file__).parents[1]
HEAVY = ("diffusers", "torch._dynamo", "torch._inductor", "transformers", "triton")


QUIET = ("ras_compile", "ras_compile.passes.algebra.layout", "ras_compile.config")
COMPILES = "ras_compile.execute.inner"


@pytest.fixture(scope="module")
def brought() -> dict[str, list[str]]:
    """The heavy packages that a fresh process has after each import, and had not after that of torch: those that bring none
    come first, so that one process tells of all."""
    code = f"""
import importlib, json, sys, torch
before, found = set(sys.modules), {{}}
for module in {[*QUIET, COMPILES]}:
    importlib.import_module(module)
    found[module] = [name for name in {HEAVY} if name in set(sys.modules) - before]
print(json.dumps(found))
"""
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("module", QUIET)
def test_an_import_brings_no_compiler(module, brought):
    assert brought[module] == []


def test_the_package_lists_its_public_names():
    assert dir(ras_compile) == sorted(ras_compile.__all__)


def test_what_compiles_brings_it(brought):
    assert "torch._inductor" in brought[COMPILES]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "passes").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_the_compiler_knows_no_device_and_no_compiler_behind_it(path):
    """Passes rewrite graphs; on what they run, and through what, is decided above them."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            assert not name.startswith(("torch.cuda", "torch._inductor", "torch._dynamo", "triton")), name
