"""One compilation at a time: what tracing sets (mode stacks, flags) is seen by all threads of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.convert_frame import compile_lock

__all__ = ["compiling"]


@contextmanager
def compiling(flagged: bool = True) -> Iterator[None]:
    """While it is open no other thread compiles, through Dynamo neither. May be nested.

    Args:
        flagged: say that PyTorch compiles, as Dynamo does: while FX traces, other threads could call no compiled function
            else. Code of the model must not see it.
    """
    with compile_lock:
        before = torch.compiler._is_compiling_flag
        torch.compiler._is_compiling_flag = before or flagged
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag = before
