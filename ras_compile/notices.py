"""Warnings that are said once: what the user should know without being told at every step."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import threading
import warnings
from collections.abc import Hashable
from types import FrameType

from ras_compile.errors import RASWarning

__all__ = ["LIBRARIES", "first_time", "reset", "user_frame", "warn_once"]

# Code that is nobody's model: PyTorch's and ours.
LIBRARIES = (
    os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin), ""),  # type: ignore[union-attr, arg-type]  # it is installed
    os.path.join(os.path.dirname(__file__), ""),
)
_INSTALLED = os.path.join(sysconfig.get_path("purelib"), "")  # a pipeline's code, which calls a model for the user

_said: set[Hashable] = set()
_lock = threading.Lock()


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame, from `frame` on, that runs the user's code, or that of the library that the user calls."""
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return frame


def warn_once(message: str) -> None:
    """Warn with `message` unless this process has already done so; the warning points to the user's line."""
    if not first_time(message):
        return
    files: list[str] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    outside = [level for level, file in enumerate(files, 1) if not file.startswith(LIBRARIES)]
    own = [level for level in outside if not files[level - 1].startswith(_INSTALLED)]
    warnings.warn(message, RASWarning, stacklevel=next(iter((*own, *outside)), 1))


def first_time(what: Hashable) -> bool:
    """Whether this process is about to say something for the first time; from now on it counts as said."""
    with _lock:
        known = what in _said
        _said.add(what)
        return not known


def reset() -> None:
    """Forget what has been said: the next warning of each kind is shown again."""
    with _lock:
        _said.clear()
