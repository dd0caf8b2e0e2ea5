"""Warnings that are said once: what the user should know without being told at every step."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable

from ras_compile.errors import RASWarning

__all__ = ["first_time", "reset", "warn_once"]

_said: set[Hashable] = set()
_lock = threading.Lock()


def warn_once(message: str, *, stacklevel: int = 3) -> None:
    """Warn with `message` unless this process has already done so."""
    if first_time(message):
        warnings.warn(message, RASWarning, stacklevel=stacklevel)


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
