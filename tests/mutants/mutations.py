"""Small defects, generated from a module's syntax tree: one at a time, each with a name that outlives changes elsewhere."""

from __future__ import annotations

import ast
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What decides whether a picture is right, by kind: files, and the functions in them (all, where none is named).
DECISIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "rules": {f"passes/rules/{path.name}": () for path in sorted((ROOT / "passes/rules").glob("[a-z]*.py"))},
    "positions": {"passes/programs/positions.py": (), "passes/algebra/tokens.py": ()},
    "splices": {"passes/analysis/splices.py": (), "passes/analysis/propagate.py": ()},
    "aliases": {"passes/programs/aliases.py": ()},
    "keys": {
        "ras_compile/dispatch/dispatcher.py": ("key_of", "Entry", "places_given", "worth_tracing"),
        "ras_compile/capture/facts.py": (),
    },
    "schedule": {"ras_compile/sampling/schedule.py": ()},
    "plans": {f"ras_compile/plans/{path.name}": () for path in sorted((ROOT / "ras_compile/plans").glob("[a-z]*.py"))},
    "branches": {
        "ras_compile/sampling/branches.py": (),
        "ras_compile/sampling/state.py": (),
        "ras_compile/sampling/registry.py": (),
        "ras_compile/sampling/reuse.py": (),
    },
}
# These come first, whatever the seed: no test saw them once.
FIRST = (
    "ras_compile/sampling/state.py:TransformerState.fail:",
    "ras_compile/dispatch/dispatcher.py:key_of:",
    "passes/rules/resampling.py::8 ",
)

FLIPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
# Nobody's picture depends on what these say.
SAYING = {"cast", "log", "warn_once", "fell_back", "first_time"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        kind: the kind of decision that it is about.
        path: the file, from the root of the repository.
        function: where, with its class; empty outside of functions.
        text: what is changed into what; with a number where the same is found more than once.
        source: the whole changed file.
        line: where the change begins.
    """

    kind: str
    path: str
    function: str
    text: str
    source: str
    line: int

    @property
    def name(self) -> str:
        return f"{self.path}:{self.function}:{self.text}"


def changed(node: ast.AST) -> Iterator[str]:
    """What a node may be changed into, as source."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in FLIPPED:
            yield ast.unparse(ast.Compare(left, [FLIPPED[type(op)]()], [right]))
        case ast.BoolOp(op=op, values=values):
            yield ast.unparse(ast.BoolOp(FLIPPED[type(op)](), values))  # type: ignore[arg-type]  # the other of the two
        case ast.BinOp(left=left, op=op, right=right) if type(op) in FLIPPED and not _joins(left, right):
            yield ast.unparse(ast.BinOp(left, FLIPPED[type(op)](), right))  # type: ignore[arg-type]  # an operator, too
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield ast.unparse(operand)
        case ast.Constant(value=bool(value)):
            yield repr(not value)
        case ast.Constant(value=int(value)):
            yield repr(value + 1)
        case ast.Constant(value=float(value)):
            yield repr(value * 2 if value else 0.5)
        case ast.IfExp(test=test, body=body, orelse=other):
            yield ast.unparse(ast.IfExp(test, other, body))
        case ast.Call(func=ast.Name(id="all" | "any" as name), args=[given]):
            yield f"{'any' if name == 'all' else 'all'}({ast.unparse(given)})"


def _joins(left: ast.expr, right: ast.expr) -> bool:
    """Whether an operator joins texts, lists or types, so that another one could only fail."""
    plain = (ast.List, ast.ListComp, ast.JoinedStr, ast.Tuple)
    return any(
        isinstance(x, plain) or (isinstance(x, ast.Constant) and not isinstance(x.value, int)) for x in (left, right)
    )


def removed(node: ast.AST, function: str) -> Iterator[str]:
    """What a statement may be changed into, as source."""
    match node:
        case ast.Expr(value=ast.Call(func=called)) if not _says(called):
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign() | ast.Delete() | ast.Raise():
            yield "pass"
        case ast.Continue() | ast.Break():
            yield "pass"
        case ast.Return(value=ast.Tuple(elts=elements)) if "key" in function and len(elements) > 1:
            for gone in elements:
                yield f"return ({', '.join(ast.unparse(e) for e in elements if e is not gone)},)"


def _says(called: ast.expr) -> bool:
    return bool(SAYING & set(ast.unparse(called).replace("_torch", "").split(".")))


def mutants_of(path: str, kind: str = "", functions: tuple[str, ...] = ()) -> Iterator[Mutant]:
    """All mutants of a file, in the order of its text."""
    source = (ROOT / path).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen: Counter[tuple[str, str]] = Counter()

    def replaced(node: ast.AST, new: str, function: str) -> Mutant:
        first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]  # expressions and statements have it
        last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        old = source[first:last]
        lines = b"\n" * old.count(b"\n")  # what follows keeps its line
        wrapped = f"({new})".encode() if isinstance(node, ast.expr) else new.encode()
        made = source[:first] + wrapped + (b"" if isinstance(node, ast.expr) else lines) + source[last:]
        text = f"{' '.join(old.decode().split())} -> {new}"
        seen[function, text] += 1
        if seen[function, text] > 1:
            text = f"{text} #{seen[function, text]}"
        return Mutant(kind, path, function, text, made.decode(), node.lineno)  # type: ignore[attr-defined]

    def visit(node: ast.AST, function: str) -> Iterator[Mutant]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        wanted = not functions or function.split(".")[0] in functions
        if wanted and isinstance(node, ast.FunctionDef) and _does(node):
            body = node.body[1:] if _is_text(node.body[0]) else node.body
            if len(body) > 1 or not isinstance(body[0], ast.Return):
                whole = ast.Expr(ast.Constant(None))
                whole.lineno, whole.col_offset = body[0].lineno, body[0].col_offset
                whole.end_lineno, whole.end_col_offset = body[-1].end_lineno, body[-1].end_col_offset
                yield replaced(whole, "pass", function)
        if wanted and isinstance(node, ast.expr):
            for new in changed(node):
                yield replaced(node, new, function)
        if wanted and isinstance(node, ast.stmt):
            for new in removed(node, function):
                yield replaced(node, new, function)
            if isinstance(node, (ast.If, ast.While)) and not isinstance(
                node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)
            ):
                yield replaced(node.test, f"not ({ast.unparse(node.test)})", function)
        if wanted and isinstance(node, (ast.Tuple, ast.Set)) and _is_key(node, function):
            for gone in node.elts:
                left = ", ".join(ast.unparse(element) for element in node.elts if element is not gone)
                yield replaced(node, f"{left}," if isinstance(node, ast.Tuple) else f"{{{left}}}", function)
        for name, field in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params", "decorator_list"):
                continue
            for child in field if isinstance(field, list) else [field]:
                if isinstance(child, ast.AST) and not _silent(child, node):
                    yield from visit(child, function)

    yield from visit(ast.parse(source), "")


def _does(function: ast.FunctionDef) -> bool:
    """Whether a function is called for what it does, and gives nothing back."""
    returned = function.returns
    return isinstance(returned, ast.Constant) and returned.value is None and function.name != "__init__"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_key(node: ast.Tuple | ast.Set, function: str) -> bool:
    """Whether a tuple says what tells things apart: all in functions of that name do."""
    return "key" in function and isinstance(getattr(node, "ctx", ast.Load()), ast.Load) and len(node.elts) > 1


def _silent(child: ast.AST, parent: ast.AST) -> bool:
    """Parts that are texts, errors or checks of types: no picture depends on them."""
    if _is_text(child) or isinstance(child, (ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
        return True
    if isinstance(parent, ast.Raise) or (isinstance(child, ast.keyword) and child.arg == "strict"):
        return True
    if isinstance(child, ast.Call) and _says(child.func):
        return True
    names = [target.id for target in getattr(child, "targets", []) if isinstance(target, ast.Name)]
    return "__all__" in names or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")


def all_mutants() -> list[Mutant]:
    """Every mutant of every decision."""
    return [
        mutant
        for kind, files in DECISIONS.items()
        for path, functions in files.items()
        for mutant in mutants_of(path, kind, functions)
    ]


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """``count`` of them: those of `FIRST`, then of each kind in turn, drawn by the seed."""
    chosen = [mutant for mutant in mutants if mutant.name.startswith(FIRST)]
    drawn = random.Random(seed)
    kinds = {
        kind: [m for m in mutants if m.kind == kind and m not in chosen]
        for kind in dict.fromkeys(m.kind for m in mutants)
    }
    for group in kinds.values():
        drawn.shuffle(group)
    while len(chosen) < count and any(kinds.values()):
        chosen += [group.pop() for group in kinds.values() if group]
    return chosen[:count]
