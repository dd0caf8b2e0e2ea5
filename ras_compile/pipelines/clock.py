"""How long the steps of a pipeline's last generation took, and how far the predicted noise moved from one to the next.

Nothing here waits for a device while pictures are drawn: on CUDA events are recorded, and read when somebody asks.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ras_compile.execute.compiling import seconds_spent

log = logging.getLogger(__name__)

# So many values of a step's prediction, evenly spread, tell how far it moved.
_VALUES = 2048
# Less than this is no compilation, but a look at what is compiled already.
_COMPILATION = 0.05


@dataclass(frozen=True)
class _Mark:
    """A moment: the host's time, what this thread has spent on compilation so far, the device, and an event of it."""

    host: float
    compiled: float
    device: torch.device
    event: torch.cuda.Event | None

    @classmethod
    def now(cls, device: torch.device) -> _Mark:
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
        return cls(time.perf_counter(), seconds_spent(), device, event)

    def until(self, later: _Mark) -> float:
        """Seconds between two moments; waits for the device. Of two devices only the host's time is known."""
        if self.event is None or later.event is None or self.device != later.device:
            return later.host - self.host
        later.event.synchronize()
        return self.event.elapsed_time(later.event) / 1000


class Clock:
    """The moments of one generation: its beginning, and the end of each step."""

    def __init__(self) -> None:
        self._marks: list[_Mark] = []
        self._seen: list[Tensor] = []

    def begin(self, device: torch.device) -> None:
        """A generation begins on `device`, before its first model call."""
        self._marks, self._seen = [_Mark.now(device)], []

    def see(self, prediction: Tensor) -> None:
        """Takes a few values of what the scheduler is given in this step; one small copy on the device."""
        flat = prediction.detach().reshape(-1)
        self._seen.append(flat[:: max(1, len(flat) // _VALUES)].to(torch.float32, copy=True))

    def tick(self, device: torch.device) -> None:
        """A step has ended."""
        if not self._marks:
            return
        before, now = self._marks[-1], _Mark.now(device)
        self._marks.append(now)
        if now.compiled - before.compiled >= _COMPILATION:
            log.info("step %d compiled for %.1f s", len(self._marks) - 2, now.compiled - before.compiled)

    def seconds(self) -> list[float]:
        """Seconds of each step, its compilation included; waits for the device."""
        return [first.until(second) for first, second in pairwise(self._marks)]

    def compiled(self) -> list[float]:
        """Seconds of each step that went into compilation."""
        spent = [second.compiled - first.compiled for first, second in pairwise(self._marks)]
        return [seconds if seconds >= _COMPILATION else 0.0 for seconds in spent]

    def changes(self) -> list[float | None]:
        """How far each step's prediction is from that of the step before, over its size; None for the first one.

        Not a number from the first prediction on that is none.
        """
        first = self._seen[:1]
        found: list[float | None] = [None if bool(seen.isfinite().all()) else math.nan for seen in first]
        for before, now in pairwise(self._seen):
            same = before.shape == now.shape
            found.append(float((now - before).norm() / now.norm().clamp_min(1e-12)) if same else None)
        return found
