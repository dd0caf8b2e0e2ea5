"""Caches that wait in the host's memory: copied to the device ahead of their use, and back behind it, beside the program.

    to_host(k)              a copy of a value in the host's memory, which a dense step leaves behind
    from_host(cache)        a copy of it on the device, where a sparse step splices into it and reads it
    write_host(cache, k)    writes that copy back

On CUDA the copies run on two streams of their own, one for each direction, within `carrying`, which knows the order in which a
program asks for its caches. All pass through a few buffers on the device, since the host runs far ahead of it: memory that it
allocated for each copy would be free again only when the copy is done, and so all caches would lie on the device at once.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

AHEAD = 4  # caches that are on their way at a time: those of two layers of attention


@dataclass(eq=False)
class _Buffer:
    """Memory on the device that a copy passes through. ``done`` is what its next user has to wait for."""

    data: Tensor
    done: torch.cuda.Event
    taken: bool = False


class _Ring:
    """Buffers by their sizes, taken in turns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[int, list[_Buffer]] = {}

    def take(self, size: int, most: int) -> _Buffer:
        """A buffer of ``size`` bytes: of at most ``most``, unless more are taken at a time."""
        known = self._buffers.setdefault(size, [])
        free = next((buffer for buffer in known if not buffer.taken), None)
        if free is None or len(known) < most:
            # this memory may have been something else's, which the device has yet to compute
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            free = _Buffer(memory, torch.cuda.current_stream(self._device).record_event())
        else:
            known.remove(free)
        known.append(free)
        free.taken = True
        return free


class _Carrier:
    """The copies of one call of a program."""

    def __init__(self, device: torch.device, caches: Sequence[Tensor]) -> None:
        self._main = torch.cuda.current_stream(device)
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._rings = _Ring(device), _Ring(device)
        self._coming: dict[int, _Buffer] = {}
        self._next = iter(caches)
        self._in.wait_stream(self._main)
        for _ in range(AHEAD):
            self._start_next()

    def _start_next(self) -> None:
        cache = next(self._next, None)
        if cache is not None:
            self._coming[cache.data_ptr()] = self._start(cache)

    def _start(self, cache: Tensor) -> _Buffer:
        buffer = self._rings[0].take(_size(cache), AHEAD)
        self._in.wait_event(buffer.done)
        with torch.cuda.stream(self._in):
            buffer.data.copy_(_bytes(cache), non_blocking=True)
        buffer.done = self._in.record_event()
        return buffer

    def bring(self, cache: Tensor, device: torch.device) -> Tensor:
        buffer = self._coming.pop(cache.data_ptr(), None) or self._start(cache)
        self._main.wait_event(buffer.done)
        here = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=device)
        _bytes(here).copy_(buffer.data)
        buffer.done, buffer.taken = self._main.record_event(), False
        self._start_next()
        return here

    def send(self, value: Tensor, cache: Tensor) -> None:
        buffer = self._rings[1].take(_size(cache), 2)
        self._main.wait_event(buffer.done)
        buffer.data.view(cache.dtype).as_strided(cache.shape, cache.stride()).copy_(value)
        self._out.wait_event(self._main.record_event())
        with torch.cuda.stream(self._out):
            _bytes(cache).copy_(buffer.data, non_blocking=True)
        buffer.done, buffer.taken = self._out.record_event(), False

    def close(self) -> None:
        """Lets the device go on when all copies are done: the buffers are free then, and the caches written."""
        self._main.wait_stream(self._in)
        self._main.wait_stream(self._out)


class _Now(threading.local):
    carrier: _Carrier | None = None


_now = _Now()


@contextmanager
def carrying(device: torch.device, caches: Sequence[Tensor]) -> Iterator[None]:
    """While it is open, this thread's copies run beside the program; without it, and on a CPU, each is waited for.

    Args:
        caches: those in the host's memory, in the order in which the program asks for them; none for a dense one.
    """
    if device.type != "cuda":
        yield
        return
    before, _now.carrier = _now.carrier, _Carrier(device, caches)
    try:
        yield
    finally:
        _now.carrier.close()
        _now.carrier = before


def _size(cache: Tensor) -> int:
    return cache.numel() * cache.element_size()


def _bytes(cache: Tensor) -> Tensor:
    """All memory of a tensor without gaps."""
    return cache.as_strided((cache.numel(),), (1,)).view(torch.uint8)


@torch.library.custom_op("ras_compile::to_host", mutates_args=())
def to_host(value: Tensor) -> Tensor:
    """A copy of a value in the host's memory, pinned where there is CUDA.

    Returns:
        one of the same shape and type; its strides have no gaps.
    """
    cache = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    _send(value, cache)
    return cache


@to_host.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="cpu")


@torch.library.custom_op("ras_compile::from_host", mutates_args=())
def from_host(cache: Tensor, device: torch.device) -> Tensor:
    """A copy on a device of what `to_host` gave."""
    if _now.carrier is not None:
        return _now.carrier.bring(cache, device)
    return cache.to(device, copy=True)


@from_host.register_fake
def _(cache: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=device)


@torch.library.custom_op("ras_compile::write_host", mutates_args={"cache"})
def write_host(cache: Tensor, value: Tensor) -> None:
    """Writes a value over what `to_host` gave, in place."""
    _send(value, cache)


@write_host.register_fake
def _(cache: Tensor, value: Tensor) -> None:
    return None


def _send(value: Tensor, cache: Tensor) -> None:
    if _now.carrier is not None:
        _now.carrier.send(value, cache)
    else:
        cache.copy_(value)
