"""Clocks: steps by CUDA events, the host's share of a call, calls that wait for the device, memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType

from ras_compile.execute.cudagraphs import Graph

__all__ = ["LAUNCHES", "HostClock", "Marks", "Memory", "Sections", "null_backend", "synchronising", "weight_bytes"]

# Runtime calls after which the host has waited for the device. A copy to pageable host memory waits, too.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WAITING_COPY = "Memcpy DtoH"
_STEADY = "benchmark: steady state"


class Marks:
    """Points in a run's time: CUDA events, which the host does not wait for, or the host's clock.

    Args:
        device: the device that the work runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def __call__(self, index: int) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Time from each mark to the next; waits for the last one."""
        if self._cuda:
            self._marks[-1].synchronize()
            return [first.elapsed_time(second) for first, second in zip(self._marks, self._marks[1:], strict=False)]
        return [1e3 * (second - first) for first, second in zip(self._marks, self._marks[1:], strict=False)]


class Sections:
    """While it is open, takes the host's time inside of some methods.

    Args:
        places: the methods by name: (class, attribute).

    Attributes:
        milliseconds: by path: `"decide/rows"` is the time in `rows` when it was called from `decide`.
    """

    def __init__(self, places: Mapping[str, tuple[type, str]]) -> None:
        self._places, self._path = places, [""]
        self.milliseconds: dict[str, float] = {}

    def __enter__(self) -> Sections:
        self._methods = {name: getattr(*place) for name, place in self._places.items()}
        for name, (owner, attribute) in self._places.items():
            setattr(owner, attribute, self._timed(name, self._methods[name]))
        return self

    def _timed(self, name: str, method: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._path[-1]
            path = f"{before}/{name}" if before else name
            self._path.append(path)
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                taken = 1e3 * (time.perf_counter() - begin)
                self.milliseconds[path] = self.milliseconds.get(path, 0.0) + taken
                self._path.pop()

        return timed

    def __exit__(self, *details: object) -> None:
        for name, (owner, attribute) in self._places.items():
            setattr(owner, attribute, self._methods[name])

    def of(self, name: str) -> float:
        """Milliseconds inside of one method, wherever it was called from."""
        return sum(taken for path, taken in self.milliseconds.items() if path.rpartition("/")[2] == name)


LAUNCH = "launch"
LAUNCHES: dict[str, tuple[type, str]] = {LAUNCH: (Graph, "replay")}

# Cycles that the device is busy before each call that is timed after a wait, about 10 ms: a host that has waited takes its
# time to find everything again, whatever it calls then.
_BUSY = 20_000_000


class HostClock:
    """Stands in for a transformer and takes the host's time of every call.

    Args:
        transformer: the transformer.
        device: its device.
        wait: wait for the device before each call, for the same time; if not, the host runs ahead of it, as it does when
            one samples.
        places: what is timed apart inside of a call, see :class:`Sections`.

    Attributes:
        milliseconds: of each call.
        sections: of each call, the time of its parts.
    """

    def __init__(
        self,
        transformer: Any,
        device: torch.device,
        wait: bool = True,
        places: Mapping[str, tuple[type, str]] = LAUNCHES,
    ) -> None:
        self._transformer, self._wait, self._places = transformer, wait and device.type == "cuda", places
        self.milliseconds: list[float] = []
        self.sections: list[Sections] = []
        if hasattr(transformer, "cache_context"):
            self.cache_context = transformer.cache_context

    def __call__(self, **inputs: Any) -> Any:
        if self._wait:
            torch.cuda._sleep(_BUSY)
            torch.cuda.synchronize()
        with Sections(self._places) as sections:
            begin = time.perf_counter()
            result = self._transformer(**inputs)
            self.milliseconds.append(1e3 * (time.perf_counter() - begin))
        self.sections.append(sections)
        return result

    @property
    def launching(self) -> list[float]:
        """Milliseconds of each call that CUDA takes to launch graphs."""
        return [sections.of(LAUNCH) for sections in self.sections]


def null_backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
    """A backend that computes once and returns at once ever after: what Dynamo itself costs per call."""
    held: list[Any] = []

    def call(*values: Any) -> Any:
        if not held:
            held.append(graph(*values))
        return held[0]

    return call


class Memory:
    """Peak memory of what is done while it is open, without what others hold.

    Args:
        device: the device.
        weights: bytes of the transformer, which every row counts as its own.
    """

    def __init__(self, device: torch.device, weights: int) -> None:
        self._cuda, self._weights = device.type == "cuda", weights
        if self._cuda:
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated()
            self._reserved = torch.cuda.memory_reserved()
            torch.cuda.reset_peak_memory_stats()

    def settled(self) -> None:
        """What came before (compilation, first runs) does not count towards the peak."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        """GB allocated at the peak: weights, and whatever was added since the beginning."""
        if not self._cuda:
            return None
        return (torch.cuda.max_memory_allocated() - self._before + self._weights) / 1e9

    def reserved_gb(self) -> float | None:
        """GB taken from the device at the peak: with the memory pools of CUDA graphs, which `peak_gb` sees in part."""
        if not self._cuda:
            return None
        return (torch.cuda.max_memory_reserved() - self._reserved + self._weights) / 1e9


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(map(_bytes, [*module.parameters(), *module.buffers()]))


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor; of one that is made of others, as quantised weights are, those of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


class _Steady:
    """A mark for `sample` that names the steps from `first` on in the profile."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._range: Any = None

    def __call__(self, index: int) -> None:
        if index == self._first:
            self._range = torch.profiler.record_function(_STEADY)
            self._range.__enter__()
        if index == self._last and self._range is not None:
            self._range.__exit__(None, None, None)


def synchronising(run: Any, first: int, steps: int) -> dict[str, int]:
    """Calls that wait for the device, by name, from step `first` to the end of a run; empty: none.

    Args:
        run: called with a mark; does one run of `steps` steps.
        first: the first step that counts.
        steps: steps of the run.
    """
    with torch.profiler.profile() as profiler:  # of everything that there is
        run(_Steady(first, steps))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = list(profiler.profiler.kineto_results.events())
    # the device has a range of the same name, which begins when its work does
    spans = [event for event in events if event.name() == _STEADY and event.device_type() == DeviceType.CPU]
    begin, end = spans[0].start_ns(), spans[0].start_ns() + spans[0].duration_ns()
    names = [event.name() for event in events if begin <= event.start_ns() <= end]
    return dict(Counter(name for name in names if name in WAITS or name.startswith(WAITING_COPY)))
