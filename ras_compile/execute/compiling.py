"""One compilation at a time: what tracing sets (mode stacks, flags) is seen by all threads of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ras_compile._torch import compile_lock, compile_session

__all__ = ["compiling"]


@contextmanager
def compiling(told: bool = True) -> Iterator[None]:
    """While it is open no other thread compiles, through Dynamo neither. May be nested.

    Args:
        told: `torch.compiler.is_compiling()` says so; not to be where code of the model runs.
    """
    with compile_lock, compile_session() if told else nullcontext():
        yield
