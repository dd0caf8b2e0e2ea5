"""Following a pipeline: its scheduler says the step, its cache contexts name the guidance branches.

Only host values are read: `step_index`, the identity of `timesteps`, and a count of the calls of `step` for schedulers
that have no `step_index` (DDIM, DDPM, PNDM, CogVideoX's).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ras_compile.config import RASConfig

__all__ = ["SchedulerFollower", "follow_branches", "present_branch", "unfollow_branches"]

_branch: ContextVar[str | None] = ContextVar("ras_compile_cache_context", default=None)
_STEPS = "_ras_compile_steps"
_DEFAULTS = RASConfig()


@dataclass
class _Steps:
    """What a watched scheduler has done."""

    taken: int = 0
    picture_shape: torch.Size | None = None
    watchers: int = 0


@functools.cache
def _watched(base: Any) -> type:
    """`base` with a `step` that counts, under the same name and signature; copies and pickles are plain `base` again.

    A class, because a function put on the instance would go into a deep copy and step the original from there.
    """

    @functools.wraps(base.step)
    def step(self, *args, **kwargs):
        result = base.step(self, *args, **kwargs)
        steps = vars(self)[_STEPS]
        steps.taken += 1
        sample = kwargs.get("sample", args[2] if len(args) > 2 else None)
        if isinstance(sample, Tensor):
            steps.picture_shape = sample.shape
        return result

    def reduce(self, protocol):
        reduced = base.__reduce_ex__(self, max(protocol, 2))
        _, (_, *arguments), state, *rest = reduced  # copyreg.__newobj__, (class, ...), attributes
        state = {name: value for name, value in (state or {}).items() if name != _STEPS}
        return (_new, (base, *arguments), state, *rest)

    members = {"step": step, "__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__}
    found = type(base.__name__, (base,), members)
    found.__qualname__ = base.__qualname__
    return found


def _new(cls: type, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


def _steps_of(scheduler: Any) -> _Steps | None:
    return getattr(scheduler, "__dict__", {}).get(_STEPS)


class SchedulerFollower:
    """Says the step of a pipeline's transformer calls; looks the scheduler up afresh at each call.

    Args:
        pipe: the pipeline; held weakly. When it is gone, the scheduler it had last is followed for those that share it.
        config: the options of generations that begin now; may be replaced at any time.
    """

    def __init__(self, pipe: Any, config: RASConfig = _DEFAULTS) -> None:
        self.config = config
        self._pipe = weakref.ref(pipe)
        self._scheduler: Any = None
        self._timesteps: Any = None
        self._key = object()
        self._origin: int | None = None
        self._taken_before = 0
        self._watch(getattr(pipe, "scheduler", None))

    def tick(self) -> tuple[object, int, int | None] | None:
        """(identity of the generation, step from 0, number of steps); None when the scheduler cannot say.

        A generation is one `timesteps` object: `set_timesteps` makes a new one. The step counts from the entry of
        `timesteps` at which the generation began (image-to-image begins late).
        """
        pipe = self._pipe()
        scheduler = self._scheduler if pipe is None else getattr(pipe, "scheduler", None)
        if scheduler is not self._scheduler:
            self._watch(scheduler)
        timesteps = getattr(scheduler, "timesteps", None)
        steps = _steps_of(scheduler)
        if timesteps is None or steps is None:
            return None
        taken = steps.taken
        if timesteps is not self._timesteps:
            self._timesteps, self._key, self._origin, self._taken_before = timesteps, object(), None, taken
        since = taken - self._taken_before
        index = getattr(scheduler, "step_index", None)
        first = getattr(scheduler, "begin_index", None) or 0
        count = len(timesteps) - first
        if index is None:
            # no step has been taken, or the scheduler does not count them
            return self._key, since, count
        if self._origin is None:
            self._origin = index - since
        return self._key, index - self._origin, count

    def picture_shape(self) -> torch.Size | None:
        """Shape of the sample that the scheduler last stepped, if any."""
        steps = _steps_of(self._scheduler)
        return steps.picture_shape if steps else None

    def stop(self) -> None:
        """Give the scheduler its own class back."""
        self._watch(None)

    def _watch(self, scheduler: Any) -> None:
        before = _steps_of(self._scheduler)
        if before is not None:
            before.watchers -= 1
            if not before.watchers:
                self._scheduler.__class__ = type(self._scheduler).__mro__[1]
                delattr(self._scheduler, _STEPS)
        self._scheduler, self._timesteps = scheduler, None
        if not callable(getattr(type(scheduler), "step", None)):
            return
        steps = _steps_of(scheduler)
        if steps is None:
            kind: type = type(scheduler)
            scheduler.__class__ = _watched(kind)
            steps = _Steps()
            setattr(scheduler, _STEPS, steps)
        steps.watchers += 1


def present_branch() -> str | None:
    """Name of the cache context that the running pipeline has entered, if any."""
    return _branch.get()


def follow_branches(transformer: nn.Module) -> None:
    """Notice the names that pipelines give their guidance branches through `transformer.cache_context(name)`."""

    @contextmanager
    def cache_context(self, name: str, *args, **kwargs) -> Iterator[None]:
        token = _branch.set(name)
        try:
            with type(self).cache_context(self, name, *args, **kwargs):
                yield
        finally:
            _branch.reset(token)

    if hasattr(type(transformer), "cache_context"):
        # a bound method, so that a deep copy of the module gets its own
        vars(transformer)["cache_context"] = MethodType(cache_context, transformer)


def unfollow_branches(transformer: nn.Module) -> None:
    """Undo `follow_branches`."""
    vars(transformer).pop("cache_context", None)
