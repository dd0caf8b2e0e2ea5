"""A watched scheduler: its steps are counted and told to its followers, through a class that takes the place of its own."""

from __future__ import annotations

import functools
import inspect
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from ras_compile.notices import user_frame
from ras_compile.pipelines.clean import Draws

_STEPS = "_ras_compile_steps"
_PLAIN = "_ras_compile_plain_class"


class Follower(Protocol):
    """Who is told the steps of a watched scheduler."""

    @property
    def asks(self) -> bool:
        """Whether it matters if the step that begins draws random numbers."""

    def stepping(self, scheduler: Any, given: dict[str, Any], loop: FrameType | None) -> Any:
        """``loop`` steps the scheduler with the arguments ``given``; returns the `model_output` that it is to take."""

    def stepped(self, result: Any, drawn: bool) -> None:
        """The scheduler has stepped and returns ``result``; whether it has drawn random numbers, where that is asked."""


@dataclass
class Steps:
    """What a watched scheduler has done, and who watches it."""

    taken: int = 0
    followers: list[Follower] = field(default_factory=list)


@functools.cache
def _watched(base: Any) -> type:
    """`base` with a `step` that counts, under the same name and signature; copies and pickles are plain `base` again.

    A class, because a function put on the instance would go into a deep copy and step the original from there.
    """
    order = list(inspect.signature(base.step).parameters)[1:]

    @functools.wraps(base.step)
    def step(self, *args, **kwargs):
        steps = steps_of(self)
        if steps is None:  # made by this class, as in `type(pipe.scheduler).from_config(...)`
            return base.step(self, *args, **kwargs)
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        loop = user_frame(sys._getframe(1))
        for follower in steps.followers:
            given[order[0]] = follower.stepping(self, given, loop)
        if args:
            args = (given[order[0]], *args[1:])
        else:
            kwargs[order[0]] = given[order[0]]
        with Draws() if any(follower.asks for follower in steps.followers) else nullcontext() as draws:
            result = base.step(self, *args, **kwargs)
        steps.taken += 1
        for follower in steps.followers:
            follower.stepped(result, draws is not None and draws.seen)
        return result

    def reduce(self, protocol):
        reduced = base.__reduce_ex__(self, max(protocol, 2))
        _, (_, *arguments), state, *rest = reduced  # copyreg.__newobj__, (class, ...), attributes
        state = {name: value for name, value in (state or {}).items() if name != _STEPS}
        return (_new, (base, *arguments), state, *rest)

    members = {
        _PLAIN: base,
        "step": step,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    found = type(base.__name__, (base,), members)
    found.__qualname__ = base.__qualname__
    return found


def _new(cls: type, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


def _plain_class(scheduler: Any) -> type:
    """The scheduler's own class, also where it is watched."""
    return getattr(type(scheduler), _PLAIN, type(scheduler))


def steps_of(scheduler: Any) -> Steps | None:
    """What a watched scheduler has done; None of one that nobody watches."""
    return getattr(scheduler, "__dict__", {}).get(_STEPS)


def watch(scheduler: Any, follower: Follower) -> None:
    """From now on a scheduler tells a follower its steps; nothing where it has none."""
    if not callable(getattr(type(scheduler), "step", None)):
        return
    steps = steps_of(scheduler)
    if steps is None:
        scheduler.__class__ = _watched(_plain_class(scheduler))
        steps = Steps()
        setattr(scheduler, _STEPS, steps)
    steps.followers.append(follower)


def unwatch(scheduler: Any, follower: Follower) -> None:
    """Undo `watch`: without followers a scheduler has its own class again."""
    steps = steps_of(scheduler)
    if steps is not None:
        steps.followers.remove(follower)
        if not steps.followers:
            scheduler.__class__ = _plain_class(scheduler)
            delattr(scheduler, _STEPS)
