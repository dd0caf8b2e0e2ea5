"""Warnings that are said once: what the user should know without being told at every step."""

from __future__ import annotations

import threading
import warnings

from ras_compile.errors import RASWarning

__all__ = ["reset", "warn_once"]

_said: set[str] = set()
_lock = threading.Lock()


def warn_once(message: str, *, stacklevel: int = 3) -> None:
    """Warn with `message` unless this process has already done so."""
    with _lock:
        if message in _said:
            return
        _said.add(message)
    warnings.warn(message, RASWarning, stacklevel=stacklevel)


def reset() -> None:
    """Forget what has been said: the next warning of each kind is shown again."""
    with _lock:
        _said.clear()
