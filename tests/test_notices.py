"""What fell back to something slower is counted in one place, and shown."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import LATENT, TEXT, model

import ras_compile
from ras_compile import notices

ROOT = Path(__file__).parents[1]
BROAD = {"Exception", "BaseException", "RuntimeError"}
# Nothing gets slower there, or it is counted elsewhere.
FREE = {
    ("kernels/tiles.py", "first"): "what cannot be launched fails again when it is timed, and is counted there",
    (
        "ras_compile/execute/homes.py",
        "listed",
    ): "a collection that another thread has changed is listed again, until it is",
    ("ras_compile/capture/kept.py", "fits"): "a call that does not fit a capture is captured, as it is without any",
    ("ras_compile/execute/inner.py", "compile_or_run"): "counted by the function that it calls for that",
    ("ras_compile/sampling/branches.py", "versions_of"): "inference tensors have no version, and so count as none",
}


def names(kind: ast.expr | None) -> set[str]:
    """The last words of the types that are caught; all of them where none is named."""
    if kind is None:
        return {"BaseException"}
    return {ast.unparse(part).split(".")[-1] for part in (kind.elts if isinstance(kind, ast.Tuple) else [kind])}


def tells(handler: ast.ExceptHandler) -> bool:
    """Whether it raises, or counts what it caught (``demand(False, ...)`` raises); when, is the handler's own affair."""
    inside = [node for statement in handler.body for node in ast.walk(statement)]
    called = {ast.unparse(node.func) for node in inside if isinstance(node, ast.Call)}
    return bool({"fell_back", "demand"} & called) or any(isinstance(node, ast.Raise) for node in inside)


def swallowed(source: str) -> Iterator[tuple[str, int]]:
    """Functions and lines that catch everything and say nothing."""
    tree = ast.parse(source)
    within: dict[ast.AST, str] = {}
    for function in ast.walk(tree):  # outer ones come first
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            within.update(dict.fromkeys(ast.walk(function), function.name))
    for node in ast.walk(tree):
        caught: set[str] = set()
        if isinstance(node, ast.ExceptHandler) and not tells(node):
            caught = names(node.type)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            caught = set().union(*map(names, node.args))
        if caught & BROAD:
            yield within.get(node, ""), node.lineno


def test_nothing_is_swallowed():
    found = {
        (path.relative_to(ROOT).as_posix(), function): line
        for folder in ("ras_compile", "passes", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for function, line in swallowed(path.read_text())
    }
    assert found.keys() == FREE.keys(), found


@pytest.mark.parametrize(
    ("handler", "seen"),
    [
        ("except Exception:\n    pass", True),
        ("except:\n    pass", True),
        ("except (OSError, torch.RuntimeError) as error:\n    print(error)", True),
        ("except Exception as error:\n    fell_back('slower', error)", False),
        ("except Exception as error:\n    raise ValueError from error", False),
        ("except OSError:\n    pass", False),
    ],
)
def test_a_swallowed_error_is_seen(handler, seen):
    assert [*swallowed(f"def f():\n  try:\n    g()\n  {handler.replace(chr(10), chr(10) + '  ')}\n")] == (
        [("f", 4)] if seen else []
    )


def test_a_suppressed_error_is_seen():
    assert [*swallowed("with contextlib.suppress(ValueError, Exception):\n    f()")] == [("", 1)]


def test_fallbacks_are_counted_by_what_is_done_instead_and_logged(caplog):
    with caplog.at_level("INFO", "ras_compile"):
        notices.fell_back("eaten cold", RuntimeError("the oven is off\nand so is the light"))
    assert caplog.messages == ["eaten cold"] and "and so is the light" in caplog.text
    notices.fell_back("eaten cold", ValueError("another reason"))
    notices.fell_back("not eaten", KeyError())
    assert [*map(str, notices.fallbacks())] == [
        "2 x eaten cold (RuntimeError: the oven is off)",
        "1 x not eaten (KeyError)",
    ]
    notices.reset()
    assert notices.fallbacks() == ()


def test_explain_shows_them():
    inputs = {"hidden_states": LATENT, "timestep": torch.ones(2), "text": TEXT}
    before = str(ras_compile.explain(model(), **inputs))
    assert "fell back" not in before
    notices.fell_back("a program run op by op", RuntimeError("no compiler"))
    explained = ras_compile.explain(model(), **inputs)
    assert [fallback.what for fallback in explained.fallbacks] == ["a program run op by op"]
    assert "fell back 1 x a program run op by op (RuntimeError: no compiler)" in str(explained)


def test_a_warning_points_past_a_pipeline_that_is_installed_elsewhere():
    calling = {"__name__": "diffusers.hooks", "call": notices.warn_once}
    exec(compile("def forward():\n    call('said in a pipeline')", "/elsewhere/diffusers/hooks.py", "exec"), calling)
    with pytest.warns(ras_compile.RASWarning) as told:
        calling["forward"]()
    assert [warning.filename for warning in told] == [__file__]
