"""CUDA graphs: each program of a plan becomes one launch.

A graph bakes addresses in, so all that it reads and writes must stay where it is, in a *slot*:

    the user's tensors, rows    copied into the slot's buffers before each launch
    caches                      returned by the slot's dense graph, at addresses of its own; the sparse graphs write there
    weights                     read where they are; once an address has changed, the program is captured anew
    outputs                     static too: the plan clones what leaves

A guidance branch of one generation holds a slot from its first dense call until its ``slots`` dictionary dies, or is
taken over as the spare of a later generation. A plan has a few slots; a branch that finds none runs without graphs.

A program's first call in a slot runs as it is, which compiles and tunes its kernels; the second one at the same weights
is captured. So what runs once, or has weights that move at every call (offloading), never pays for a capture.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import compress

import torch
from torch import Tensor, fx

from ras_compile._torch import (
    OpOverload,
    addresses_equal,
    clear_cublas_workspaces,
    copy_tensors,
    current_raw_stream,
    is_traceable_wrapper_subclass,
    schema_of,
)
from ras_compile.execute.inner import Compiled
from ras_compile.notices import fell_back, warn_once

# Slots of one plan: guidance branches, and generations that take turns or run in several threads.
SLOTS = 4
DEVICE = "cuda"
_LEASE = "graph slot"
_NOTHING_TO_CHANGE = nullcontext()
_TRANSFERS = {"aten::to", "aten::_to_copy", "aten::copy", "aten::copy_", "prims::device_put"}

# One capture at a time: streams come from a small pool, and two threads may be given the same one.
_capturing = threading.Lock()


def warn_without(reason: str) -> None:
    warn_once(f"ras_compile: without CUDA graphs, which makes small models slower: {reason}.")


class Graph:
    """A captured program. ``results`` are the tensors that every replay writes; they hold no values before the first.

    Args:
        compiled: the program, which has run before.
        inputs: what it reads and writes, at addresses that stay.
        pool: the graph whose memory it may share, as the two never run at once.
    """

    def __init__(self, compiled: Compiled, inputs: Sequence[Tensor], pool: Graph | None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream: torch.cuda.Stream = torch.cuda.Stream() if pool is None else pool._stream
        shared = None if pool is None else pool._graph.pool()
        # a capture that fails leaves its stream behind as the current one: the outer context puts ours back
        with _capturing, torch.cuda.stream(torch.cuda.current_stream()):
            # cuBLAS keeps a workspace per stream: each graph gets its own, in its own memory
            clear_cublas_workspaces()
            try:
                with torch.cuda.graph(self._graph, shared, self._stream, capture_error_mode="thread_local"):
                    self.results = list(compiled(*inputs))
            except Exception:
                _recover()
                raise
            finally:
                clear_cublas_workspaces()

    def replay(self) -> None:
        self._graph.replay()


def _recover() -> None:
    """After a capture that failed the random generator believes that it still is captured; one that succeeds ends that."""
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")


class Slot:
    """Buffers for the user's tensors and the rows, and the graphs captured on them.

    Args:
        users: the user's tensors of the first call; later ones have the same sizes and strides.
    """

    def __init__(self, users: Sequence[Tensor]) -> None:
        dims = [repeated(user) for user in users]
        targets = [
            torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=part.device)
            for part in map(distinct, users, dims)
        ]
        self.users = [target.expand(user.shape) for target, user in zip(targets, users, strict=True)]
        self._repeated = [(index, found) for index, found in enumerate(dims) if found]
        # of one dtype, PyTorch copies a list of tensors in one launch
        self._alike: dict[torch.dtype, tuple[list[Tensor], list[int]]] = {}
        for index, target in enumerate(targets):
            if target.numel():
                buffers, places = self._alike.setdefault(target.dtype, ([], []))
                buffers.append(target)
                places.append(index)
        self.rows: dict[int | str, Tensor] = {}
        self.graphs: dict[int | str, tuple[tuple[int, ...], Graph]] = {}
        self.seen: dict[int | str, tuple[int, ...]] = {}
        self.wanted = True  # by a model that is alive: what Dynamo compiled outlives it
        self._stream: torch.cuda.Stream | None = None

    def fill(self, users: Sequence[Tensor]) -> None:
        """Copies the user's tensors of a call in."""
        given = list(users)
        for index, dims in self._repeated:
            given[index] = distinct(given[index], dims)
        for buffers, places in self._alike.values():
            if len(buffers) == 1:
                buffers[0].copy_(given[places[0]])
            else:
                copy_tensors(buffers, [given[place] for place in places])

    def fill_rows(self, rows: Tensor, active: int | str) -> Tensor:
        """Copies the rows of a call in; returns their buffer."""
        if active not in self.rows:
            self.rows[active] = torch.empty_like(rows)
        return self.rows[active].copy_(rows)

    def enter(self, device: torch.device) -> None:
        """Waits, on the device, for what another stream still does in this slot."""
        if device.type == "cuda":
            last = self._stream
            # by number: to make an object of the current stream costs the host 20 us
            if last is None or last.cuda_stream != current_raw_stream(device.index):
                self._stream = torch.cuda.current_stream(device)
                if last is not None:
                    self._stream.wait_stream(last)


class _Lease:
    """Holds a slot; gives it back when it dies.

    Args:
        free: the list that it goes back to (appending is atomic: this may run inside any garbage collection).
    """

    def __init__(self, slot: Slot, free: list[Slot]) -> None:
        self.slot, self._free = slot, free
        self.static = False  # whether the caches of this branch are the slot's own

    def __del__(self) -> None:
        if self.slot.wanted:
            self._free.append(self.slot)


def _unwanted(slot: weakref.ref[Slot], graphs: weakref.ref[ProgramGraphs]) -> None:
    """The model of a slot is gone."""
    found, owner = slot(), graphs()
    if found is not None:
        found.wanted = False
        if owner is not None:
            owner._claim(found)


class ProgramGraphs:
    """Runs the programs of one plan, through CUDA graphs where it can.

    Args:
        weights: for each tensor input of the programs, whether it is a weight or constant, read at its own address.
    """

    def __init__(self, weights: Sequence[bool], device: torch.device) -> None:
        self._count = len(weights)
        self._is_weight = list(weights)
        self._users = [index for index, weight in enumerate(weights) if not weight]
        self._weights = [index for index, weight in enumerate(weights) if weight]
        self._last: tuple[list[int], tuple[int, ...]] | None = None  # see `_addresses`
        self._device = device
        self._free: list[Slot] = []
        self._slots: weakref.WeakSet[Slot] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._refused: set[int | str] = set()

    @property
    def slots(self) -> int:
        """How many slots there are, in use or not."""
        return len(self._slots)

    def release(self) -> None:
        """Drops the slots that no branch holds, with their graphs and memory."""
        self._free.clear()

    @classmethod
    def of(cls, graph: fx.Graph, tensors: Sequence[Tensor], weights: Sequence[bool]) -> ProgramGraphs | None:
        """The graphs of a plan made from ``graph``; None (and one warning, on CUDA) where it must not be captured."""
        device = next((value.device for value in tensors if value.device.type == DEVICE), None)
        if device is None:
            return None
        reason = uncapturable(graph, tensors, weights, device)
        if reason:
            warn_without(reason)
            return None
        return cls(weights, device)

    def run(
        self, active: int | str, compiled: Compiled, inputs: list[Tensor], slots: dict, spare: dict | None = None
    ) -> Sequence[Tensor]:
        """Runs one program. What it returns may be overwritten by the next call: the caller clones what leaves.

        Args:
            active: ``"dense"``, or the sparse program's active rows per sample.
            inputs: tensor inputs of the call; for a sparse program then ``rows`` and the caches, which it writes.
            spare: what a branch of a finished generation kept.
        """
        addresses = self._addresses(inputs)
        dense = active == "dense"
        lease = self._lease(slots, spare, inputs, addresses) if dense else slots.get(_LEASE)
        if lease is None:
            return compiled(*inputs)
        if dense or lease.static:
            results = self._replay(active, compiled, inputs, lease.slot, addresses)
            if dense:
                lease.static = results is not None
            if results is not None:
                return results
        lease.slot.seen[active] = addresses
        return compiled(*inputs)

    def _addresses(self, inputs: list[Tensor]) -> tuple[int, ...]:
        """Where the weights are; the same object for as long as none of them moves. Nothing else tells that one has moved:
        `weight.data = other` changes neither the object nor its version."""
        last = self._last
        if last is not None and addresses_equal is not None and addresses_equal(inputs, last[0], self._weights):
            return last[1]
        found = tuple(map(Tensor.data_ptr, compress(inputs, self._is_weight)))
        if last is None or found != last[1]:
            known = [0] * self._count
            for index, address in zip(self._weights, found, strict=True):
                known[index] = address
            self._last = last = known, found
        return last[1]

    def _replay(
        self, active: int | str, compiled: Compiled, inputs: list[Tensor], slot: Slot, addresses: tuple[int, ...]
    ) -> list[Tensor] | None:
        """The results of a graph, which is captured if it is time to; None: run without."""
        known, graph = slot.graphs.get(active, (None, None))
        if known is not addresses and known != addresses:
            graph = None
            if slot.seen.get(active) != addresses or active in self._refused:
                return None
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # the user captures a graph of their own
        rows, caches = inputs[self._count : self._count + 1], inputs[self._count + 1 :]
        # buffers and caches are plain tensors, whatever mode the call is made in: another mode may write them later
        with plain_mode(self._device):
            slot.enter(self._device)
            slot.fill([inputs[index] for index in self._users])
            rows = [slot.fill_rows(given, active) for given in rows]
            if graph is None:
                static = list(inputs[: self._count])
                for index, buffer in zip(self._users, slot.users, strict=True):
                    static[index] = buffer
                graph = self._capture(active, compiled, [*static, *rows, *caches], slot, addresses)
            if graph is not None:
                graph.replay()
            return graph.results if graph is not None else None

    def _capture(
        self, active: int | str, compiled: Compiled, inputs: Sequence[Tensor], slot: Slot, addresses: tuple[int, ...]
    ) -> Graph | None:
        if active == "dense":
            slot.graphs.clear()  # those on the old caches
        dense = slot.graphs.get("dense")
        try:
            graph = Graph(compiled, inputs, None if dense is None else dense[1])
        except Exception as error:
            self._refused.add(active)
            fell_back("a program run without a CUDA graph", error)
            what = "dense program" if active == "dense" else f"sparse program for {active} rows"
            warn_once(f"ras_compile: the {what} runs without a CUDA graph, capturing it failed: {error}")
            return None
        slot.graphs[active] = addresses, graph
        return graph

    def _lease(
        self, slots: dict, spare: dict | None, inputs: Sequence[Tensor], addresses: tuple[int, ...]
    ) -> _Lease | None:
        """The slot that a branch holds, or may have from now on."""
        if _LEASE not in slots:
            lease = spare.pop(_LEASE, None) if spare else None
            if spare:
                spare.clear()  # its caches, too
            if lease is None:
                slot = self._take(inputs, addresses)
                if slot is None:
                    warn_once(
                        f"ras_compile: more than {SLOTS} guidance branches or generations at a time share one compiled "
                        "graph; the others run without CUDA graphs."
                    )
                    return None
                lease = _Lease(slot, self._free)
            slots[_LEASE] = lease
        return slots[_LEASE]

    def _take(self, inputs: Sequence[Tensor], addresses: tuple[int, ...]) -> Slot | None:
        """A free slot that knows these weights (two transformers may share a plan), else a new one, else any free one."""
        free = list(self._free)
        for slot in free:
            if slot.seen.get("dense") == addresses and self._claim(slot):
                return slot
        with self._lock:
            if len(self._slots) < SLOTS:
                with torch.inference_mode(False), torch.no_grad():
                    slot = Slot([inputs[index] for index in self._users])
                self._slots.add(slot)
                for weight in self._weights[:1]:
                    weakref.finalize(inputs[weight], _unwanted, weakref.ref(slot), weakref.ref(self))
                return slot
        return next((slot for slot in free if self._claim(slot)), None)

    def _claim(self, slot: Slot) -> bool:
        """Takes a slot from the list, unless another thread was faster."""
        with suppress(ValueError):
            self._free.remove(slot)
            return True
        return False


def plain_mode(device: torch.device) -> AbstractContextManager:
    """Where new tensors are plain ones, nothing is recorded, and a CUDA device is the current one: graphs are launched there."""
    there = device.type != "cuda" or device.index == torch.cuda.current_device()
    if there and not torch.is_inference_mode_enabled() and not torch.is_grad_enabled():
        return _NOTHING_TO_CHANGE
    return _plain_mode(device)


@contextmanager
def _plain_mode(device: torch.device) -> Iterator[None]:
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield


def repeated(tensor: Tensor) -> list[int]:
    """The dimensions along which a tensor is expanded."""
    return [dim for dim, stride in enumerate(tensor.stride()) if stride == 0 and tensor.shape[dim] > 1]


def distinct(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Without its repetitions along ``dims``: a buffer that overlaps itself cannot be copied into."""
    for dim in dims:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def uncapturable(
    graph: fx.Graph, tensors: Sequence[Tensor], weights: Sequence[bool], device: torch.device
) -> str | None:
    """Why a program must not be captured: a graph would repeat the first call's values of whatever is not on the device.

    A number that is the same in every call may be baked in; one that is copied to the device is read where it was.
    """
    if any(is_traceable_wrapper_subclass(value) for value in tensors):
        return "an input is a tensor subclass"
    placeholders = graph.find_nodes(op="placeholder")
    for node, value, weight in zip(placeholders, tensors, weights, strict=True):
        if value.device != device and not (weight and value.ndim == 0):
            return f"the input {node.name} is on {value.device} and not on {device}"
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.device != device and node.op == "call_function":
            users = [schema_of(user.target).name for user in node.users if isinstance(user.target, OpOverload)]
            if value.ndim or _TRANSFERS.intersection(users):
                return f"{node.target} computes on {value.device}"
    return None
