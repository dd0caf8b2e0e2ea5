"""Small functions of tensors as CUDA graphs: what runs between the programs costs one launch, not one per operation."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cudagraphs import DEVICE, Graph, Slot, plain_mode
from .notices import warn_once

__all__ = ["Replayed"]

# Graphs of one function in one thread: shapes and settings that are in use; the least recently used one goes first.
LIMIT = 32
_clock = itertools.count()


@dataclass
class _Entry:
    """A function at some shapes and settings: buffers and graph once it is captured, nothing where it cannot be."""

    used: int
    recorded: tuple | None = None


class Replayed:
    """A pure function that is replayed as a CUDA graph from its second call with the same shapes and settings on.

    Without CUDA, inside a capture of the user's own, or where a capture fails, it simply runs.

    Args:
        function: ``(*tensors, *settings) -> tuple of tensors``; draws no random numbers, reads nothing from the device.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._local = threading.local()

    def __call__(self, tensors: Sequence[Tensor], *settings: Hashable) -> tuple[Tensor, ...]:
        device = tensors[0].device
        if device.type != DEVICE:
            return self._function(*tensors, *settings)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # the user captures a graph of their own
            return self._function(*tensors, *settings)
        key = (settings, tuple([(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]))
        known: dict[Hashable, _Entry] = self._local.__dict__.setdefault("known", {})
        entry = known.get(key)
        if entry is None:  # the first call compiles kernels
            known[key] = _Entry(next(_clock))
            if len(known) > LIMIT:
                del known[min(known, key=lambda key: known[key].used)]
            return self._function(*tensors, *settings)
        entry.used = next(_clock)
        if entry.recorded is None:
            entry.recorded = self._captured(tensors, settings)
        if not entry.recorded:
            return self._function(*tensors, *settings)
        slot, graph = entry.recorded
        with plain_mode(device):
            slot.enter(device)
            slot.fill(tensors, [], "")
            graph.replay()
            return tuple([result.clone() for result in graph.results])

    def _captured(self, tensors: Sequence[Tensor], settings: tuple) -> tuple:
        """The buffers and the graph; nothing where it cannot be captured."""
        if any(tensor.device.type != DEVICE for tensor in tensors):
            return ()
        with plain_mode(tensors[0].device):
            slot = Slot([torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors])
            slot.enter(tensors[0].device)
            slot.fill(tensors, [], "")
            try:
                return slot, Graph(lambda *given: self._function(*given, *settings), slot.users, None)
            except Exception as error:
                warn_once(f"ras_compile: the selection runs without a CUDA graph, capturing it failed: {error}")
                return ()
