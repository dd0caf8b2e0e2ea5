"""One compilation at a time: what tracing sets (mode stacks, flags) is seen by all threads of a process."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from ras_compile._torch import compile_lock, compile_session

told: list[Callable[[bool], None]] = []  # called with True where a thread begins to compile, and with False behind it


class _Spent(threading.local):
    """What this thread has spent inside of `compiling`, which may be nested."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0


_spent = _Spent()


@contextmanager
def compiling(announced: bool = True) -> Iterator[None]:
    """While it is open no other thread compiles, through Dynamo neither, and no garbage is collected. May be nested.

    Args:
        announced: whether `torch.compiler.is_compiling()` is True meanwhile; it must not be where the model's own code runs.
    """
    with compile_lock, compile_session() if announced else nullcontext(), uncollected():
        began, _spent.depth = time.perf_counter(), _spent.depth + 1
        if _spent.depth == 1:
            for tell in told:
                tell(True)
        try:
            yield
        finally:
            _spent.depth -= 1
            if not _spent.depth:
                _spent.seconds += time.perf_counter() - began
                for tell in told:
                    tell(False)


@contextmanager
def uncollected() -> Iterator[None]:
    """Python collects no garbage while it is open, in any thread. May be nested.

    Captured graphs are hundreds of thousands of objects, all of them alive. A collector that goes through them and through
    everything else again and again while they grow takes a fifth of the first picture of a process that compiles nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def seconds_spent() -> float:
    """Seconds that this thread has spent on capture and compilation so far."""
    return _spent.seconds
