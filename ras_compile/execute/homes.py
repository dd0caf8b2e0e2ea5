"""Who keeps the runs of generations and the caches that finished ones leave: a thread, an asyncio task, or a `generation`."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

_T = TypeVar("_T")
_homes: weakref.WeakSet[Home] = weakref.WeakSet()


def homes() -> list[Home]:
    """Every home there is, those of other threads included."""
    return listed(_homes)


def listed(values: Iterable[_T]) -> list[_T]:
    """The present values of a weak collection to which other threads add."""
    while True:
        with suppress(RuntimeError):  # it changed size in between
            return list(values)


class Home:
    """Keeps runs (one per transformer) for as long as whoever runs them: a thread, an asyncio task, or a generation."""

    def __init__(self) -> None:
        self.runs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        # caches of finished runs, by transformer and plan
        self.spare: weakref.WeakKeyDictionary[Any, dict[Hashable, list[dict]]] = weakref.WeakKeyDictionary()
        _homes.add(self)
