"""From where in the code a pipeline's loop calls its transformers, so that calls of other code are no part of its generation."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from types import CodeType, FrameType
from typing import Any

from ras_compile.notices import user_frame

# So many of the functions that have called each other tell where a call comes from.
_FRAMES = 3
_RESUMED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class CallSites:
    """From where the pipeline's loop calls its transformers, within one generation: a call from elsewhere is no part of it.

    A callback that looks at the model between two steps calls it from code of its own, and so does another loop that takes
    turns with the pipeline's. A place is of the loop if the generation's first call came from there; or if a call came from
    there behind one of the loop's in the same step; or if the scheduler stepped with no other call since its last step.
    A run of the same lines from within the loop, as of a callback that draws a preview with a pipeline of the same class,
    is another loop: the code that steps the scheduler stands once more among the functions that have called each other.
    """

    def __init__(self) -> None:
        self._stepper: CodeType | None = None  # the code that calls the scheduler's step
        # how many times it was running when the scheduler stepped last, or at the generation's first call
        self._depth = 0
        self.begin()

    def begin(self) -> None:
        """A generation begins."""
        self._known: dict[str, set[Hashable]] = {}
        self._strange: dict[str, set[Hashable]] = {}  # unknown places of calls since the scheduler's last step
        self._called: set[str] = set()  # transformers that the loop has called since then

    def is_loop(self, transformer: str, frame: FrameType | None) -> bool:
        """Whether the loop makes a call of `transformer`, which `frame` makes."""
        depth = self._times_running(frame)
        if not self._called and not any(self._known.values()):
            self._depth = depth
        elif depth > self._depth:
            return False
        site, known = self._site(frame), self._known.setdefault(transformer, set())
        if site not in known and known and transformer not in self._called:
            self._strange.setdefault(transformer, set()).add(site)
            return False
        known.add(site)
        self._called.add(transformer)
        return True

    def stepping(self, loop: FrameType | None) -> None:
        """The scheduler is about to step, called by `loop`."""
        stepper = None if loop is None else loop.f_code
        for transformer, sites in self._strange.items():
            if transformer not in self._called:
                self._known[transformer] |= sites
        self._strange, self._called = {}, set()
        if stepper is not self._stepper:
            self._stepper = stepper
            self._known = {name: set(map(self._cut, sites)) for name, sites in self._known.items()}
        self._depth = self._times_running(loop)

    def _times_running(self, frame: FrameType | None) -> int:
        """How many times the stepping code stands among `frame` and the functions that have called it."""
        count = 0
        while frame is not None:
            count += frame.f_code is self._stepper
            frame = frame.f_back
        return count

    def _site(self, frame: FrameType | None) -> Hashable:
        """The places in the code from which a call comes: as far out as the loop, but not beyond what is resumed."""
        places: list[tuple[CodeType, int]] = []
        while (frame := user_frame(frame)) is not None and len(places) < _FRAMES:
            places.append((frame.f_code, frame.f_lasti))
            if frame.f_code is self._stepper or frame.f_code.co_flags & _RESUMED:
                break
            frame = frame.f_back
        return tuple(places)

    def _cut(self, site: Any) -> Hashable:
        codes = [code for code, _ in site]
        return site[: codes.index(self._stepper) + 1] if self._stepper in codes else site
