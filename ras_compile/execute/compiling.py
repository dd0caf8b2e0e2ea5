"""One compilation at a time: what tracing sets (mode stacks, flags) is seen by all threads of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch._dynamo.convert_frame import compile_lock

__all__ = ["compiling"]

# Says that PyTorch compiles, as Dynamo does since 2.13: while FX traces, other threads could call no compiled function else.
_session = getattr(torch.compiler, "_compile_session_context", nullcontext)


@contextmanager
def compiling(told: bool = True) -> Iterator[None]:
    """While it is open no other thread compiles, through Dynamo neither. May be nested.

    Args:
        told: `torch.compiler.is_compiling()` says so; not to be where code of the model runs.
    """
    with compile_lock, _session() if told else nullcontext():
        yield
