"""Every text that the library may say to its user, read from its source: of warnings, and of errors that are raised on purpose."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Message", "messages", "said"]

ROOT = Path(__file__).parents[2]
# What makes a warning or an error, and the rules' shorthand for one. What a spec demands is told by one entry.
SAYING = {
    "ConfigError", "GraphBreak", "RASError", "RuntimeError", "TypeError", "UnsupportedGraph", "UnusableInput",
    "ValueError", "unsupported", "warn_once",
}  # fmt: skip
HOLE = "\0"  # stands for what is filled in


@dataclass(frozen=True)
class Message:
    """One text: where it is said, and its words, with `HOLE` for what is filled in."""

    place: str
    text: str

    @property
    def words(self) -> str:
        """The first words by which a reader looks it up: up to five of the first part that has three, or all of the longest."""
        parts = [part.removeprefix("ras_compile:").split() for part in self.text.split(HOLE)]
        part = next((part for part in parts if len(part) > 2), max(parts, key=len))
        return " ".join(part[:5])


def messages() -> list[Message]:
    """All of them, but those that are made of other texts alone."""
    found = []
    for folder in ("ras_compile", "passes", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            found += [Message(f"{place}:{line}", text) for line, text in said(ast.parse(path.read_text()))]
    return found


def said(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and texts of a module. A variable counts as every text that its function puts into it."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for scope in [tree, *functions]:
        texts: dict[str, list[str]] = {}
        for node in ast.walk(scope):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    texts.setdefault(name, []).append(_text(value))
        for node in ast.walk(scope):
            match node:
                case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]) if name in SAYING:
                    found = texts.get(first.id, []) if isinstance(first, ast.Name) else [_text(first)]
                    yield from ((node.lineno, text) for text in found if text.strip(HOLE))


def _text(node: ast.AST) -> str:
    match node:
        case ast.Constant(value=str() as value):
            return value
        case ast.JoinedStr(values=values):
            return "".join(map(_text, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
    return HOLE
