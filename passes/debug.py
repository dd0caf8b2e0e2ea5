"""``RAS_DEBUG=folder``: each program before and after each of its passes, as text that can be read and compared.

    folder/0003-sparse-16/00-built.txt          the program as it was built, for 16 active rows
    folder/0003-sparse-16/01-scatter.txt        after the pass `scatter`
    folder/0003-sparse-16/01-scatter.diff       what that pass has changed, as a unified diff

Programs are numbered in the order in which they are built, by all processes that write into one folder. Names sort in the order
of the passes. A folder that cannot be written costs a warning, and never a picture.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ras_compile._torch import OpOverload, schema_of
from ras_compile.notices import warn_once
from ras_compile.passes.analysis.roles import Role, of_role, role_of
from ras_compile.passes.programs.aliases import INVOKE
from ras_compile.passes.rules.registry import source_line


def text(program: fx.GraphModule, *, stable: bool = False) -> str:
    """A program, one node a line: `name: dtype[sizes] = op(arguments)`; then its repeated blocks.

    Args:
        stable: names are made from ops instead of taken from PyTorch, and the user's source lines are left out, so that the
            text is the same wherever the program is built.
    """
    parts = [_graph_text("program", program.graph, stable)]
    for name, block in program.named_children():
        if isinstance(block, fx.GraphModule):
            parts.append(_graph_text(name, block.graph, stable))
    return "\n".join(parts)


def _graph_text(title: str, graph: fx.Graph, stable: bool) -> str:
    names = _stable_names(graph) if stable else {node: node.name for node in graph.nodes}
    lines, last = [f"{title}:"], None
    for node in graph.nodes:
        source = None if stable else source_line(node)
        if source is not None and source != last:
            lines.append(f"    # {source}")
            last = source
        lines.append(f"    {_line(node, names)}")
    return "\n".join(lines) + "\n"


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0], names)}"
    value = described(node.meta.get("val"))
    if node.op == "placeholder":
        role = role_of(node)
        return f"{names[node]}: {value} ({role.value if role else 'no role'})"
    if node.op == "get_attr":
        return f"{names[node]} = {node.target}"
    given = [_argument(argument, names) for argument in node.args]
    given += [f"{name}={_argument(argument, names)}" for name, argument in node.kwargs.items()]
    return f"{names[node]}: {value} = {_op(node)}({', '.join(given)})"


def _op(node: fx.Node) -> str:
    if isinstance(node.target, OpOverload):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def described(value: Any) -> str:
    """`f32[2, 16, 64]`, with strides where they are not those of a contiguous tensor."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(described, value))})"
    if not isinstance(value, torch.Tensor):
        return str(value)
    kind = str(value.dtype).removeprefix("torch.")
    for long, short in (("bfloat", "bf"), ("float", "f"), ("complex", "c"), ("int", "i")):
        if kind.startswith(long):
            kind = short + kind.removeprefix(long)
            break
    plain = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return f"{kind}{list(value.shape)}{plain}"


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_argument(entry, names) for entry in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_argument(entry, names)}' for key, entry in value.items())}}}"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value).removeprefix("torch.")
    return repr(value) if isinstance(value, str) else str(value)


def _stable_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Names by what a node is for: the role of an input, or the op, each with a number of its own."""
    counts: dict[str, Iterator[int]] = {}
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        role = role_of(node)
        if role is not None:
            kind = role.value
        elif isinstance(node.target, OpOverload):
            kind = schema_of(node.target).name.split("::")[-1]
        else:
            kind = "block" if node.target is INVOKE else str(getattr(node.target, "__name__", node.target))
        number = next(counts.setdefault(kind, itertools.count()))
        names[node] = f"{kind}_{number}"
    return names


class Journal:
    """Writes one program down, pass by pass."""

    def __init__(self, program: fx.GraphModule, folder: Path | None) -> None:
        self.program, self.folder, self._number = program, folder, itertools.count()
        self._before = ""
        if folder is not None:
            self.after("built")

    @classmethod
    def of(cls, program: fx.GraphModule) -> Journal:
        """The journal of a program: in a new folder in that of ``RAS_DEBUG``, or nowhere."""
        named = os.environ.get("RAS_DEBUG")
        try:
            return cls(program, _new_folder(Path(named), program) if named else None)
        except OSError as error:
            _warn(named, error)
            return cls(program, None)

    def after(self, name: str) -> None:
        """The program has been through a pass."""
        if self.folder is None:
            return
        now = text(self.program)
        stem = f"{next(self._number):02d}-{name.replace(' ', '-')}"
        try:
            (self.folder / f"{stem}.txt").write_text(now)
            if self._before:
                (self.folder / f"{stem}.diff").write_text(_difference(self._before, now, stem))
        except OSError as error:
            _warn(str(self.folder), error)
            self.folder = None
        self._before = now


def _difference(before: str, after: str, name: str) -> str:
    lines: Sequence[str] = [*difflib.unified_diff(before.splitlines(), after.splitlines(), "before", name, lineterm="")]
    return "\n".join(lines) + "\n" if lines else ""


def _new_folder(parent: Path, program: fx.GraphModule) -> Path:
    """A folder of the next number, which no other process has taken."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(found.name[:4]) for found in parent.iterdir() if found.name[:4].isdigit()]
    rows = of_role(program.graph, Role.ROWS)
    kind = f"sparse-{rows[0].meta['val'].shape[1]}" if rows else "dense"
    lengths = "-lengths" if of_role(program.graph, Role.LENGTH) else ""
    for number in itertools.count(max(taken, default=0) + 1):
        try:
            (made := parent / f"{number:04d}-{kind}{lengths}").mkdir()
            return made
        except FileExistsError:
            continue
    raise AssertionError("there is always a next number")


def _warn(folder: str | None, error: OSError) -> None:
    warn_once(
        f"ras_compile: RAS_DEBUG names a folder that cannot be written, {folder} ({error.strerror or error}); programs are not "
        "written down: set RAS_DEBUG to a folder that this process may make and fill, or unset it."
    )
