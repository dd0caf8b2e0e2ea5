"""What the user should know: warnings that are said once, and what fell back to something slower."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import threading
import warnings
from collections.abc import Hashable
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ras_compile.errors import RASWarning

if TYPE_CHECKING:
    from ras_compile.kernels.fallbacks import Fallback

# Code that is nobody's model: PyTorch's and ours, and that of the log, to which Dynamo tells what is told to users.
LIBRARIES = (
    os.path.join(os.path.dirname(logging.__file__), ""),
    os.path.join(os.path.dirname(torch.__file__), ""),
    os.path.join(os.path.dirname(__file__), ""),
)
# A pipeline's code, which calls a model for the user: what is installed, and what may be installed elsewhere.
_INSTALLED = os.path.join(sysconfig.get_path("purelib"), "")
_PIPELINES = {"accelerate", "diffusers", "peft", "transformers"}

# What is done with a model that was refused.
REFUSED = "a model run dense"

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
    outside, own, level = [], [], 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        level += 1
        file, package = frame.f_code.co_filename, str(frame.f_globals.get("__name__")).partition(".")[0]
        if not file.startswith(LIBRARIES):
            outside.append(level)
            if not file.startswith(_INSTALLED) and package not in _PIPELINES:
                own.append(level)
        frame = frame.f_back
    warnings.warn(message, RASWarning, stacklevel=next(iter((*own, *outside)), 1))


def first_time(what: Hashable) -> bool:
    """Whether this process is about to say something for the first time; from now on it counts as said."""
    with _lock:
        known = what in _said
        _said.add(what)
        return not known


class MethodModule(ModuleType):
    """A module that bears the name of one of a handle's methods, and says so where it is taken for that."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = self.__name__.rpartition(".")[2]
        raise TypeError(
            f"{name} is a method of what ras_compile.attach(pipe) returns; write handle.{name}(...), not ras_compile.{name}(...)."
        )


def reset() -> None:
    """Forget what has been said and counted: the next warning of each kind is shown again."""
    from ras_compile.kernels import fallbacks

    with _lock:
        _said.clear()
    fallbacks.forget()


def fallbacks() -> tuple[Fallback, ...]:
    """What this process has done in a slower way because the faster one failed, the first first; empty where all went well.

    Each has ``what`` (what is done instead), ``error`` (the first error's type and first line) and ``count``; ``str()`` is a line.
    """
    # not at the top: the kernels bring Triton, and an import of options must not
    from ras_compile.kernels import fallbacks

    return fallbacks.fallbacks()


def slower() -> tuple[Fallback, ...]:
    """Those of :func:`fallbacks` that may be of any model. One that was refused is told with its own steps, not with another's."""
    return tuple(fallback for fallback in fallbacks() if fallback.what != REFUSED)


def fell_back(what: str, error: BaseException) -> None:
    """Counts and logs ``error``, after which ``what`` is done instead: something slower. See :func:`fallbacks`."""
    from ras_compile.kernels import fallbacks

    fallbacks.fell_back(what, error)
