"""Small functions of tensors as CUDA graphs: what runs between the programs costs one launch, not one per operation."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cudagraphs import DEVICE, Graph, Slot, on
from .notices import warn_once

__all__ = ["Replayed"]

# Graphs of one function in one thread: shapes and settings that are in use; the least recently used one goes first.
LIMIT = 32


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
        if any(tensor.device.type != DEVICE for tensor in tensors):
            return self._function(*tensors, *settings)
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():  # the user captures a graph of their own
            return self._function(*tensors, *settings)
        key = (settings, tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors))
        known: OrderedDict[Hashable, Any] = self._local.__dict__.setdefault("known", OrderedDict())
        if key not in known:  # the first call compiles kernels
            known[key] = None
            if len(known) > LIMIT:
                known.popitem(last=False)
            return self._function(*tensors, *settings)
        known.move_to_end(key)
        if known[key] is None:
            known[key] = self._captured(tensors, settings)
        if not known[key]:
            return self._function(*tensors, *settings)
        slot, graph = known[key]
        with torch.inference_mode(False), torch.no_grad(), on(tensors[0].device):
            slot.enter(tensors[0].device)
            slot.fill(tensors, [], "")
            graph.replay()
            return tuple(result.clone() for result in graph.results)

    def _captured(self, tensors: Sequence[Tensor], settings: tuple) -> tuple:
        """The buffers and the graph; nothing where it cannot be captured."""
        with torch.inference_mode(False), torch.no_grad(), on(tensors[0].device):
            slot = Slot([torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors])
            slot.enter(tensors[0].device)
            slot.fill(tensors, [], "")
            try:
                return slot, Graph(lambda *given: self._function(*given, *settings), slot.users, None)
            except Exception as error:
                warn_once(f"ras_compile: the selection runs without a CUDA graph, capturing it failed: {error}")
                return ()
