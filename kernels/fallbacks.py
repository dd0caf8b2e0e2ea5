"""What has been done in a slower way because the faster one failed: counted here, so that nothing is swallowed unseen.

It stands with the kernels because every package may import them, and they import none; `ras_compile.notices` has it for all.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fallback:
    """One way in which this process runs slower than it would have."""

    what: str  # what is done instead, as a phrase
    error: str  # the first error's type and its first line
    count: int = 1  # how often

    def __str__(self) -> str:
        return f"{self.count} x {self.what} ({self.error})"


_counted: dict[str, Fallback] = {}
_lock = threading.Lock()


def fell_back(what: str, error: BaseException) -> None:
    """Counts and logs an error after which something slower is done. The error is not kept: it holds the frames of its call.

    Args:
        what: what is done instead; one of a few fixed phrases, so that the table stays small.
    """
    log.info("%s", what, exc_info=error)
    line = next(iter(str(error).strip().splitlines()), "")
    with _lock:
        known = _counted.get(what)
        text = known.error if known else f"{type(error).__name__}: {line}" if line else type(error).__name__
        _counted[what] = Fallback(what, text, 1 + (known.count if known else 0))


def fallbacks() -> tuple[Fallback, ...]:
    """All that this process has counted, in the order of their first time."""
    with _lock:
        return tuple(_counted.values())


def forget() -> None:
    """Begins to count anew."""
    with _lock:
        _counted.clear()
