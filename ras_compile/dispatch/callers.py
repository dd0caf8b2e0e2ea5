"""Who calls what is compiled: the compiled module, and the module whose code calls that, as the stack shows them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from ras_compile import _torch

__all__ = ["LIBRARIES", "compiled_call", "holder", "is_call", "receiver"]

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))  # code that is nobody's model


def compiled_call() -> tuple[nn.Module, tuple, dict] | None:
    """The compiled module whose call is running now, and its arguments; None where a function was compiled instead."""
    frame = _call_frame()
    if frame is None:
        return None
    args, kwargs = frame.f_locals.get("args"), frame.f_locals.get("kwargs")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        return None
    owner, _ = _owner_of(frame)
    return None if owner is None else (owner, args, kwargs)


def holder() -> tuple[nn.Module, nn.Module] | None:
    """The module whose running code calls the compiled one and holds more weights than that; and the compiled one."""
    owner, frame = _owner_of(_call_frame())
    root = _torch.original(owner)
    if root is None:
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


def _call_frame() -> Any:
    """The frame in which Dynamo calls what it has compiled; None if there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None and not is_call(frame.f_code):
        frame = frame.f_back
    return frame


def is_call(code: CodeType) -> bool:
    """Whether in it Dynamo calls what it has compiled."""
    return code.co_qualname.startswith(_torch.DynamoContext.__name__ + ".")


def _owner_of(frame: Any) -> tuple[nn.Module | None, Any]:
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
