"""Warnings that are said once: what the user should know without being told at every step."""

from __future__ import annotations

import threading
import warnings

__all__ = ["RASWarning", "warn_once"]

_said: set[str] = set()
_lock = threading.Lock()


class RASWarning(UserWarning):
    """Something runs dense, or costs more than it must; the picture is right all the same."""


def warn_once(message: str, *, stacklevel: int = 3) -> None:
    """Warn with `message` unless this process has already done so."""
    with _lock:
        if message in _said:
            return
        _said.add(message)
    warnings.warn(message, RASWarning, stacklevel=stacklevel)
