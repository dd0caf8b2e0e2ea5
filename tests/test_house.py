"""The house's own rules: tests use public names, and documents name files that exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("ras_compile", "passes", "kernels", "examples", "integrations")
# Private to the library, not from its tests: its functions are where private API of PyTorch is called, and each has a test.
ALLOWED = {"_torch"}
# Their string arguments name attributes.
NAMING = {"getattr", "setattr", "delattr", "hasattr", "pop"}

# A page's template, and the folder that the page is written to.
TEMPLATES = {"examples/quality/report.md": "examples/quality/results"}
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("build", "node_modules") for part in path.relative_to(ROOT).parts)
)


def private(name: str) -> bool:
    protocol = name.startswith("__") or name.endswith("_")  # as `_repr_html_`, which notebooks call
    return name.startswith("_") and not protocol


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module gives to something of its own: functions, classes, variables, attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
    return set(filter(private, found))


def used(tree: ast.AST) -> list[tuple[int, str]]:
    """Lines and private names that a module reads, writes, patches or imports from elsewhere."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                found.append((node.lineno, name))
            case ast.ImportFrom(names=names):
                found += [(node.lineno, alias.name) for alias in names]
            case ast.Call(func=ast.Attribute(attr=function) | ast.Name(id=function)) if function in NAMING:
                found += [(node.lineno, arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
    return [(line, name) for line, name in found if isinstance(name, str) and private(name)]


@cache
def of_the_library() -> frozenset[str]:
    files = chain.from_iterable((ROOT / folder).rglob("*.py") for folder in SOURCES)
    return frozenset(chain.from_iterable(defined(ast.parse(path.read_text())) for path in files))


def touched(source: str) -> list[tuple[int, str]]:
    """Lines and names of a test's source that belong to the library's inside."""
    tree = ast.parse(source)
    own = defined(tree)
    return [(line, name) for line, name in used(tree) if name in of_the_library() - own - ALLOWED]


def test_tests_touch_public_names_alone():
    """What a test reaches into cannot be moved without it: the library gives it a public seam instead."""
    found = {path.relative_to(ROOT).as_posix(): touched(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "source",
    [
        "keeper._kept",
        "keeper._kept = {}",
        "monkeypatch.setattr(keeper, '_kept', {})",
        "getattr(keeper, '_kept')",
        "from ras_compile import _HOMES",
    ],
)
def test_a_private_name_of_the_library_is_seen(source):
    assert [name for _, name in touched(source)] in (["_kept"], ["_HOMES"])


@pytest.mark.parametrize(
    "source",
    [
        "keeper.held",
        "op._opoverload",  # of PyTorch
        "class Own:\n    def __init__(self):\n        self._kept = 1\n    def f(self):\n        return self._kept",
    ],
)
def test_other_names_are_free(source):
    assert not touched(source)


@cache
def files() -> frozenset[str]:
    """Files and folders of the repository, those that git ignores left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a checkout and git")
    found = [Path(name) for name in listed if (ROOT / name).exists()]
    return frozenset(
        chain.from_iterable((path.as_posix(), *(f"{up.as_posix()}/" for up in path.parents)) for path in found)
    )


FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|json|png|toml|txt|yml)|(?:[\w.-]+/)+")


INSIDE = re.compile(r"\b(?:ras_compile|passes|kernels|tests|examples|docs|integrations)/(?:\w+/)*\w+\.\w+")


def named(text: str) -> list[str]:
    """Files and folders in backticks, with the test behind `::`, if one is named; in blocks of code, paths from the root."""
    blocks = re.compile(r"```.*?```", re.DOTALL)
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", blocks.sub("", text))
    found = [span for span in spans if FILE.fullmatch(span.split("::")[0])]
    return found + [path for block in blocks.findall(text) for path in INSIDE.findall(block)]


def linked(text: str) -> list[str]:
    """Targets of relative links and pictures."""
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [target for target in targets if target and "://" not in target and not target.startswith("mailto:")]


def is_there(name: str) -> bool:
    """Whether some path of the repository ends in this; of `file::test`, whether that file has a test of that name."""
    name, _, test = name.partition("::")
    places = [path for path in files() if path == name or path.endswith(f"/{name}")]
    return any(not test or re.search(rf"\b{test}\b", (ROOT / path).read_text()) for path in places)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_what_exists(document):
    text = document.read_text()
    folder = ROOT / TEMPLATES.get(document.relative_to(ROOT).as_posix(), document.parent)
    missing = [name for name in named(text) if not is_there(name)]
    missing += [target for target in linked(text) if not (folder / target).exists()]
    assert not missing


def test_readme_is_short():
    """A newcomer reads it in four minutes; what is longer belongs on a page of docs/."""
    assert len((ROOT / "README.md").read_text().split()) <= 900


def address() -> str | None:
    """Where the repository is published, by pyproject.toml; None as long as nobody has said it."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {}).get("Repository")


def test_links_of_the_readme_lead_to_files():
    """They are relative: clones and forks have no other address in common."""
    text = (ROOT / "README.md").read_text()
    assert len(linked(text)) > 10 and not [name for name in linked(text) if not (ROOT / name).exists()]
    assert address() is None or address() not in text


def test_no_address_is_a_placeholder():
    """A link to nowhere is worse than none; the form of an address belongs to CONTRIBUTING.md alone."""
    for name in [
        "README.md",
        "pyproject.toml",
        "mkdocs.yml",
        "CITATION.cff",
        "docs/index.md",
        "integrations/space/README.md",
    ]:
        text = (ROOT / name).read_text()
        assert not re.search(r"://[^\s/]*/?(OWNER|NAME|USER|YOUR\w*)\b|\bOWNER\b", text), name
        assert name != "mkdocs.yml" or ("repo_url:" in text) == (address() is not None)


def test_a_missing_file_is_seen():
    text = "`passes/rules/nowhere.py`, `README.md`, `tests/conftest.py::test_nothing`, [more](docs/nowhere.md), `x.y`"
    text += "\n```sh\npython examples/nothing.py\n```\n"
    assert [name for name in named(text) if not is_there(name)] == [
        "passes/rules/nowhere.py",
        "tests/conftest.py::test_nothing",
        "examples/nothing.py",
    ]
    assert linked(text) == ["docs/nowhere.md"]


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests of all files")
def test_one_process_runs_all_tests_of_a_file(request):
    """What they share is made once; xdist knows a group by the end of the test's name."""
    assert request.node.nodeid.endswith(f"@{request.path}")
