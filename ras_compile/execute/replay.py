"""Small functions of tensors as one launch: compiled by Inductor, then replayed as CUDA graphs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ras_compile.config import RASConfig
from ras_compile.execute.compiling import compiling
from ras_compile.execute.cudagraphs import DEVICE, Graph, Slot, plain_mode
from ras_compile.execute.inner import compile_inner
from ras_compile.notices import fell_back, warn_once

# Graphs of one function in one thread: shapes and settings that are in use; the least recently used one goes first.
LIMIT = 32
_clock = itertools.count()

Function = Callable[..., Sequence[Tensor]]


@dataclass
class _Recorded:
    """A captured graph and its buffers."""

    slot: Slot  # buffers of what is copied in at each call
    kept: Slot  # buffers of what stays
    graph: Graph
    held: tuple[Tensor, ...]  # what stands in those


@dataclass
class _Entry:
    """A function at some shapes and settings; `recorded` once it is captured, False where it cannot be."""

    used: int
    function: Function
    recorded: _Recorded | bool | None = None


class Replayed:
    """A pure function that is replayed as a CUDA graph from its second call with the same shapes and settings on.

    Inside a capture of the user's own, or where a capture fails, it simply runs. Without CUDA it is not for calling: see `plain`.

    Args:
        function: ``(*tensors, *settings) -> tuple of tensors``; draws no random numbers, reads nothing from the device.
    """

    def __init__(self, function: Function) -> None:
        self.plain = function
        self._local = threading.local()
        self._compiled: dict[Hashable, Function] = {}

    def __call__(
        self, tensors: Sequence[Tensor], *settings: Hashable, kept: tuple[Tensor, ...] = (), fuse: bool = False
    ) -> Sequence[Tensor]:
        """The function of ``(*tensors, *kept, *settings)``.

        Args:
            kept: more tensors, which nobody writes: copied in only where they are others than in the call before.
            fuse: compile the function with Inductor, for each set of shapes and settings, before it first runs.
        """
        device = tensors[0].device
        key = (settings, fuse, tuple([(value.shape, value.dtype, value.device) for value in (*tensors, *kept)]))
        known: dict[Hashable, _Entry] = self._local.__dict__.setdefault("known", {})
        entry = known.get(key)
        if entry is None:  # the first call compiles kernels
            function = self._fused(key, [*tensors, *kept], settings) if fuse else self._with(settings)
            known[key] = _Entry(next(_clock), function)
            if len(known) > LIMIT:
                del known[min(known, key=lambda key: known[key].used)]
            return function(*tensors, *kept)
        entry.used = next(_clock)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # the user captures a graph of their own
            return entry.function(*tensors, *kept)
        if entry.recorded is None:
            entry.recorded = _captured(entry.function, tensors, kept)
        if not isinstance(entry.recorded, _Recorded):
            return entry.function(*tensors, *kept)
        recorded = entry.recorded
        with plain_mode(device):
            recorded.slot.enter(device)
            recorded.slot.fill(tensors)
            if any(new is not old for new, old in zip(kept, recorded.held, strict=True)):
                recorded.kept.fill(kept)
                recorded.held = kept
            recorded.graph.replay()
            return tuple([result.clone() for result in recorded.graph.results])

    def sharing_code(self) -> Replayed:
        """The same function, compiled once for both, with graphs of its own: they go when it goes."""
        other = Replayed(self.plain)
        other._compiled = self._compiled
        return other

    def _with(self, settings: tuple) -> Function:
        return lambda *tensors: self.plain(*tensors, *settings)

    def _fused(self, key: Hashable, tensors: Sequence[Tensor], settings: tuple) -> Function:
        """The function through Inductor, for all threads and for tensors of any strides; as it is where that fails."""
        with compiling():
            if key not in self._compiled:
                while len(self._compiled) >= LIMIT:
                    del self._compiled[next(iter(self._compiled))]
                try:
                    with plain_mode(tensors[0].device):
                        # one tensor in two places would be traced as one input
                        given = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
                        graph = make_fx(self._with(settings), tracing_mode="fake")(*given)
                        compiled = compile_inner(graph, given, RASConfig())
                    self._compiled[key] = lambda *tensors: compiled(*[tensor.contiguous() for tensor in tensors])
                except Exception as error:
                    fell_back("the selection run op by op", error)
                    self._compiled[key] = self._with(settings)
            return self._compiled[key]


def _captured(function: Function, tensors: Sequence[Tensor], kept: tuple[Tensor, ...]) -> _Recorded | bool:
    """The buffers and the graph; False where it cannot be captured."""
    if any(tensor.device.type != DEVICE for tensor in (*tensors, *kept)):
        return False
    with plain_mode(tensors[0].device):
        changing, staying = _filled(tensors), _filled(kept)
        try:
            return _Recorded(changing, staying, Graph(function, [*changing.users, *staying.users], None), kept)
        except Exception as error:
            fell_back("the selection run without a CUDA graph", error)
            warn_once(f"ras_compile: the selection runs without a CUDA graph, capturing it failed: {error}")
            return False


def _filled(tensors: Sequence[Tensor]) -> Slot:
    """Contiguous buffers with these contents."""
    slot = Slot([torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors])
    if tensors:
        slot.enter(tensors[0].device)
        slot.fill(tensors)
    return slot
