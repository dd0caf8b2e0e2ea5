"""The documents are true: their code runs, their options and messages are those of the library."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from messages import messages, said

import ras_compile
from ras_compile.config import RUNTIME_OPTIONS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").replace("\\", "").split())


def test_every_message_is_explained():
    """A kernel's message is found by the kernel's name, every other one by its first words."""
    page = plain((ROOT / "docs" / "troubleshooting.md").read_text())
    found = {message.place: message.words for message in messages()}
    assert len(found) > 100
    kernels = {place: words.split()[0] for place, words in found.items() if place.startswith("kernels/")}
    missing = {place: words for place, words in {**found, **kernels}.items() if plain(words) not in page}
    assert not missing, "docs/troubleshooting.md explains every message"


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text()
    shown = re.findall(r"^::: ras_compile\.(\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(name for name in ras_compile.__all__ if name != "__version__")


def test_the_tables_of_options_are_those_of_the_config():
    """Every option has a row, with its default; those that `configure` takes stand in the first table."""
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    defaults = {name: ast.literal_eval(default) for name, default in rows}
    assert len(defaults) == len(rows)
    assert defaults.pop("preset", 0) is None
    assert defaults == vars(ras_compile.RASConfig())
    assert [name for name, _ in rows[: len(RUNTIME_OPTIONS) + 1]] == [
        "preset",
        *(n for n in defaults if n in RUNTIME_OPTIONS),
    ]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ConfigError(f'option {name} is new here')", "option \0 is new here"),
        ("def f():\n    text = 'one ' + f'{x}'\n    raise ValueError(text)", "one \0"),
        ("warn_once('ras_compile: hear hear')", "ras_compile: hear hear"),
    ],
)
def test_a_message_is_seen(source, text):
    assert text in [found for _, found in said(ast.parse(source))]
