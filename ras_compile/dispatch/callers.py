"""Who calls what is compiled: the compiled module, and the module whose code calls that, as the stack shows them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from ras_compile import _torch
from ras_compile.notices import LIBRARIES

_DYNAMO = str(Path(torch.__file__).parent / "_dynamo")
# Code that calls a capture of another process, as Dynamo calls its own (`dispatch/kept.py`).
kept_calls: list[CodeType] = []  # compared by identity: code that holds slices has no hash
# What is compiled of a module, if it is not its forward alone.
_CALLS = ("_call_impl", "_wrapped_call_impl", "__call__")


def compiled_call() -> tuple[nn.Module, tuple, dict] | None:
    """The compiled module whose call is running now, and its arguments; None where a function was compiled instead."""
    frame = _call_frame()
    if frame is None:
        return None
    args, kwargs = frame.f_locals.get("args"), frame.f_locals.get("kwargs")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        return None
    owner, _ = owner_of(frame)
    return None if owner is None else (owner, args, kwargs)


def called_pipeline() -> str | None:
    """The class of a whole pipeline, which has a transformer and is none, where the user had that compiled."""
    frame = _call_frame()
    called = None if frame is None else frame.f_locals.get("fn")
    owner = inspect.unwrap(called) if callable(called) else called
    owner = getattr(owner, "__self__", owner)
    pipeline = not isinstance(owner, nn.Module) and isinstance(getattr(owner, "transformer", None), nn.Module)
    return type(owner).__name__ if pipeline else None


def compiled_modules() -> Iterator[nn.Module]:
    """Every compiled module whose call is running now, the innermost one first."""
    frame = _call_frame()
    while frame is not None:
        owner, _ = owner_of(frame)
        if owner is not None:
            yield owner
        frame = _call_frame(frame.f_back)


def caller_is_known() -> bool:
    """Whether the stack shows who calls the compiled graph that runs now.

    A graph that is called without Dynamo has nobody to ask for, and a function may be compiled in place of a module; but where
    Dynamo calls the graph and none of the frames of :func:`is_call` is there, or one of a module's call and no module, this
    version of PyTorch calls what it compiled in another way.
    """
    frame = _call_frame()
    if frame is None:
        return not _dynamo_calls()
    called = frame.f_locals.get("fn")
    method = isinstance(getattr(called, "__self__", None), nn.Module) and called.__name__ in _CALLS
    return not method or owner_of(frame)[0] is not None


def _dynamo_calls() -> bool:
    """Whether any code of Dynamo's runs in this thread."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_DYNAMO):
        frame = frame.f_back
    return frame is not None


def holder() -> tuple[nn.Module, nn.Module] | None:
    """The module whose running code calls the compiled one and holds more weights than that; and the compiled one."""
    call = _call_frame()
    owner, frame = owner_of(call)
    root = _torch.original(owner)
    if root is None and call is not None:  # a method of it was compiled: `block.forward = torch.compile(block.forward)`
        root = getattr(call.f_locals.get("fn"), "__self__", None)
    if not isinstance(root, nn.Module):
        return None
    held = sum(1 for _ in root.parameters())
    while frame is not None:
        module = receiver(frame) if is_method(frame.f_code) else None
        if isinstance(module, nn.Module) and any(part is root for part in module.modules()):
            weights = sum(1 for _ in module.parameters())
            if weights > held:
                return module, root
        frame = frame.f_back
    return None


def is_method(code: CodeType) -> bool:
    """Whether it is a method's, not of a library. Only of such is `f_locals` read: Python 3.11 and 3.12 keep what it returns,
    and with it all that the function had, for as long as the function runs.
    """
    if code.co_filename.startswith(LIBRARIES) or not code.co_argcount:
        return False
    where, dot, _ = code.co_qualname.rpartition(".")
    return bool(dot) and not where.endswith("<locals>")


def receiver(frame: Any) -> Any:
    """The first argument of the function that runs in a frame: of a method, its object, whatever it is called there."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _call_frame(start: Any = None) -> Any:
    """The frame in which Dynamo calls what it has compiled, the innermost one from ``start`` on; None if there is none."""
    frame: Any = start or sys._getframe(1)
    while frame is not None and not is_call(frame.f_code):
        frame = frame.f_back
    return frame


def is_call(code: CodeType) -> bool:
    """Whether in it Dynamo calls what it has compiled, or a capture of another process is called in its place."""
    return code.co_qualname.startswith(_torch.DynamoContext.__name__ + ".") or any(
        code is known for known in kept_calls
    )


def owner_of(frame: Any) -> tuple[nn.Module | None, Any]:
    """The compiled module that Dynamo calls in a frame, if it is one, and the frame that calls it."""
    frame = frame and frame.f_back
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        owner = frame.f_locals.get("self")
        if isinstance(owner, _torch.OptimizedModule) or (
            isinstance(owner, nn.Module) and _torch.compiled_call(owner) is not None
        ):
            return owner, frame.f_back
        frame = frame.f_back
    return None, frame
