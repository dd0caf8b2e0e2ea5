"""Where a model call stands, as far as somebody says so: `ras_compile.generation(...)`, then an attached pipeline.

Nothing here reads from a device. Where nobody says, `inference.py` infers.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ras_compile.config import RASConfig, is_whole
from ras_compile.errors import ConfigError
from ras_compile.execute.homes import Home
from ras_compile.notices import warn_once
from ras_compile.passes.algebra.tokens import TokenView

__all__ = [
    "AttachedCall",
    "Evaluation",
    "Follower",
    "Generation",
    "Tick",
    "attached_call",
    "generation",
    "owner",
    "present",
]


class Generation(Home):
    """One denoising run of a hand-written loop; made by `ras_compile.generation`.

    Args:
        num_steps: how many steps the run has, where known; "linear" ratios need it.
    """

    def __init__(self, num_steps: int | None = None) -> None:
        super().__init__()
        if num_steps is not None and not (is_whole(num_steps) and num_steps >= 1):
            raise ConfigError(f"generation(num_steps={num_steps!r}): it takes None or a whole number of at least 1.")
        self.num_steps = None if num_steps is None else int(num_steps)
        self.key = object()
        self.current: int | None = None
        self.ended = False
        self._branch: str | None = None

    def step(self) -> int:
        """Call once for each step, before the step's model calls. Returns the step's number, from 0.

        The model calls that follow are this generation's, also where others have been entered since (two generators that
        take turns) and where the thread is another one (a server that runs each step of a generator in some thread).

        Raises:
            ConfigError: the generation has ended.
        """
        self.speak()
        self.current = 0 if self.current is None else self.current + 1
        if self.num_steps is not None and self.current >= self.num_steps:
            warn_once(
                f"ras_compile: generation(num_steps={self.num_steps}): step() was called more often than that; ratios that "
                "depend on the number of steps keep their last value."
            )
        return self.current

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Name the guidance branch ("cond", "uncond", ...) of the model calls inside; else the contexts tell.

        Raises:
            ConfigError: the name is no string, or the generation has ended.
        """
        if not isinstance(name, str):
            raise ConfigError(f"branch({name!r}): it takes the name of a guidance branch, such as 'cond'.")
        self.speak()
        before, self._branch = self._branch, name
        try:
            yield
        finally:
            self._branch = before

    def speak(self) -> None:
        """From now on the model calls of this context are this generation's."""
        if self.ended:
            raise ConfigError(
                "this generation has ended: step(), branch() and the model calls belong inside `with ras_compile.generation(...)`."
            )
        _generations.set((*(other for other in _running() if other is not self), self))

    def end(self) -> None:
        """In whatever order generations end, and in whatever context: see `speak`."""
        self.ended = True
        _generations.set(_running())
        for state in list(self.runs):
            state.retire(self)

    @property
    def branch_name(self) -> str | None:
        return self._branch


@dataclass(frozen=True)
class Evaluation:
    """What one model call of a step computed; the scheduler's step follows.

    Args:
        latent: the latent.
        view: its token view.
        rows: the active rows [B, A]; None after a dense call.
        noise_reuse: that option of the generation.
    """

    latent: Tensor
    view: TokenView
    rows: Tensor | None
    noise_reuse: str


class Follower(Protocol):
    """What an attached pipeline can say about the present model call, from host values alone.

    Attributes:
        config: the options of generations that begin now.
    """

    config: RASConfig

    def tick(self) -> tuple[Hashable, int, int | None] | None:
        """(identity of the generation, step from 0, number of steps), or None when the scheduler does not say."""

    def time(self) -> Tensor | None:
        """The scheduler's own timestep of the present call, 0-d; None when it does not say."""

    def leave(self) -> None:
        """The present calls are of another loop, which is not that of the pipeline."""

    def late(self) -> bool:
        """Whether the run began after the first step of its schedule, as image-to-image does."""

    def check_clean(self) -> None:
        """Refuse a scheduler of which the clean sample cannot be told."""

    def replaced(self) -> bool:
        """Whether the latent of the present step is not what the scheduler's last step returned."""

    def refusal(self) -> str:
        """Why no step of this generation may be sparse; empty where nothing is known against it."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Take one model call of the present step."""

    def window(self, latent: Tensor) -> slice | None:
        """The tokens of a packed latent [B, N, C] that are the picture; None: all of them, as far as is known."""

    def overwritten(self, view: TokenView, latent: Tensor) -> Tensor | None:
        """Tokens that the pipeline puts back after every step, bool [B, N]; None: none of them."""


@dataclass
class AttachedCall:
    """One call of an attached transformer, from its entry to its return."""

    follower: Follower
    transformer: str
    branch: str | None = None
    reached: bool = field(default=False)


@dataclass(frozen=True)
class Tick:
    """What is said about the present call; `step` None: nobody says.

    Args:
        home: where the runs of this caller are kept.
        key: identity of the generation, compared by `is`.
        step: step of the generation, from 0.
        num_steps: steps of the generation, where known.
        branch: name of the guidance branch, where somebody named it.
        transformer: label of the transformer, for the trace.
    """

    home: Home
    key: Hashable
    step: int | None
    num_steps: int | None
    branch: str | None
    transformer: str


class _Here(threading.local):
    """What tells a thread from all others, which may have had its number."""

    def __init__(self) -> None:
        self.thread = object()


class _Owner(Home):
    """Home of the runs that no `generation` holds: those of one thread, or of one asyncio task."""

    def __init__(self, thread: object, task: asyncio.Task | None) -> None:
        super().__init__()
        self._thread = thread
        self._task = None if task is None else weakref.ref(task)
        # what graphs have returned last, by the tensors' ids: the tensor, the transformer's state, and the graph
        self.outputs: dict[int, tuple[weakref.ref, weakref.ref, Hashable]] = {}

    def is_of(self, thread: object, task: asyncio.Task | None) -> bool:
        if self._thread is not thread:
            return False
        return self._task is None if task is None else self._task is not None and self._task() is task


# The one that spoke last is the last. No tokens: generators end in any order, and servers may end them in a copied context.
_generations: ContextVar[tuple[Generation, ...]] = ContextVar("ras_compile_generations", default=())
_attached: ContextVar[AttachedCall | None] = ContextVar("ras_compile_attached_call", default=None)
_here = _Here()
_owner: ContextVar[_Owner | None] = ContextVar("ras_compile_owner", default=None)


@contextmanager
def generation(num_steps: int | None = None) -> Iterator[Generation]:
    """Mark one denoising run, and say which step is which.

    ::

        with ras_compile.generation(num_steps=28) as gen:
            for t in timesteps:
                gen.step()
                noise = compiled(latent, t, prompt)

    Without any `gen.step()` it only marks where the generation begins and ends. Belongs to the thread or the asyncio
    task that entered it.

    Raises:
        ConfigError: `num_steps` is not a positive whole number.
    """
    found = Generation(num_steps)
    found.speak()
    try:
        yield found
    finally:
        found.end()


def _running() -> tuple[Generation, ...]:
    """The generations that this context has entered and that have not ended, the one that spoke last at the end."""
    return tuple(generation for generation in _generations.get() if not generation.ended)


@contextmanager
def attached_call(call: AttachedCall) -> Iterator[AttachedCall]:
    """For `attach`: everything inside is one call of the attached transformer."""
    token = _attached.set(call)
    try:
        yield call
    finally:
        _attached.reset(token)


def present_call() -> AttachedCall | None:
    """The attached call that is running, if any."""
    return _attached.get()


def owner() -> _Owner:
    """The home of the running thread or asyncio task. Contexts are copied into tasks and threads; a home is not."""
    task = asyncio.current_task() if asyncio._get_running_loop() is not None else None
    found = _owner.get()
    if found is None or not found.is_of(_here.thread, task):
        found = _Owner(_here.thread, task)
        _owner.set(found)
    return found


def present() -> Tick:
    """What is said about the call that is running."""
    explicit, call = next(iter(_running()[::-1]), None), _attached.get()
    home: Home = explicit or owner()
    key: Hashable = explicit.key if explicit else None
    num_steps = explicit.num_steps if explicit else None
    branch = (explicit.branch_name if explicit else None) or (call.branch if call else None)
    name = call.transformer if call else "transformer"
    if explicit is not None and explicit.current is not None:
        return Tick(home, key, explicit.current, num_steps, branch, name)
    said = call.follower.tick() if call else None
    if said is not None:
        key, step, count = said
        return Tick(home, key, step, num_steps if num_steps is not None else count, branch, name)
    return Tick(home, key, None, num_steps, branch, name)
