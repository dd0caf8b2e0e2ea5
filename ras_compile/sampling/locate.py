"""Where a model call stands, as far as somebody says so: one answer, read once for each call.

`ras_compile.generation(...)` says it in a hand-written loop, then an attached pipeline, whose scheduler is followed. Nothing
here reads from a device. Where nobody says it, `inference.py` finds it out.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ras_compile.config import RASConfig, is_whole
from ras_compile.errors import ConfigError
from ras_compile.execute.homes import Home
from ras_compile.notices import warn_once
from ras_compile.passes.algebra.tokens import TokenView


class Generation(Home):
    """One denoising run of a hand-written loop; made by `ras_compile.generation`, and entered by `with`.

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
        self.entered = self.ended = self.reached = False
        self.branch_name: str | None = None

    def __enter__(self) -> Generation:
        self.entered = True
        self.make_current()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.current is not None and not self.reached and kind is None:
            warn_once(
                "ras_compile: no model call of a generation() reached the backend, so that all of them ran as they are. Call what "
                "torch.compile(model, backend='ras') returned; if you do, Dynamo gave the model's forward up: "
                "TORCH_LOGS=graph_breaks names the line, or TORCH_LOGS=recompiles the reason why it was compiled too often."
            )
        self.end()

    def step(self) -> int:
        """Call once for each step, before the step's model calls. Returns the step's number, from 0.

        The model calls that follow are this generation's, also where others have been entered since (two generators that
        take turns) and where the thread is another one (a server that runs each step of a generator in some thread).

        Raises:
            ConfigError: the generation has ended, or was not entered by `with`.
        """
        self.make_current()
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
            ConfigError: the name is no string, or the generation is not running.
        """
        if not isinstance(name, str):
            raise ConfigError(f"branch({name!r}): it takes the name of a guidance branch, such as 'cond'.")
        self.make_current()
        before, self.branch_name = self.branch_name, name
        try:
            yield
        finally:
            self.branch_name = before

    def make_current(self) -> None:
        """From now on the model calls of this context are this generation's."""
        if self.ended or not self.entered:
            why = "ended" if self.ended else "not begun"
            raise ConfigError(
                f"this generation has {why}: step(), branch() and the model calls belong inside "
                "`with ras_compile.generation(...)`."
            )
        _generations.set((*(other for other in _running() if other is not self), self))

    def end(self) -> None:
        """In whatever order generations end, and in whatever context: see `make_current`."""
        self.ended = True
        _generations.set(_running())
        for state in list(self.runs):
            state.retire(self)


@dataclass(frozen=True)
class Evaluation:
    """What one model call of a step computed; the scheduler's step follows."""

    latent: Tensor
    view: TokenView  # its token view
    rows: Tensor | None  # the active rows [B, A]; None after a dense call
    noise_reuse: str  # that option of the generation


@dataclass(frozen=True)
class Said:
    """What an attached pipeline says of one call of its transformer, from host values alone."""

    key: Hashable  # identity of the generation, compared by `is`
    step: int  # step of the generation, from 0
    num_steps: int | None  # steps of the generation
    late: bool  # the run began after the first step of its schedule, as image-to-image does
    times: Tensor  # the scheduler's own timesteps, exact and unscaled
    entry: int  # the present one of them
    # by the number of tokens of a packed latent [B, N, C]: which of them are the picture, None for all
    windows: Mapping[int, slice | None]
    refusal: str  # why no step of this generation may be sparse; empty where nothing is known against it
    replaced: bool  # the latent is not what the scheduler's last step returned


class Follower(Protocol):
    """An attached pipeline.

    Attributes:
        config: the options of generations that begin now.
    """

    config: RASConfig

    def overwritten(self, view: TokenView, latent: Tensor) -> Tensor | None:
        """Tokens that the pipeline puts back after every step, bool [B, N]; None: none of them."""

    def check_clean(self) -> None:
        """Refuse a scheduler of which the clean sample cannot be told."""

    def noise_levels(self) -> Sequence[float]:
        """How much of the latent is noise, in [0, 1], at each of the timesteps and at the end; empty where unknown."""

    def velocity_terms(self) -> Sequence[tuple[float, float]]:
        """Scale and shift that make the model's prediction a velocity, at each of the timesteps; empty where it is one."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Take one model call of the present step."""

    def leave(self) -> None:
        """The present calls are of another loop, which is not that of the pipeline."""


@dataclass(slots=True)
class AttachedCall:
    """One call of an attached transformer, from its entry to its return."""

    follower: Follower  # the pipeline
    transformer: str  # the pipeline's name for it
    branch: str | None = None  # name of the guidance branch, where the pipeline gives one
    said: Said | None = None  # what the pipeline says of the call; None: nothing
    # the call is made by other code than the pipeline's loop, a callback's, and so is no part of its generation
    aside: bool = False
    reached: bool = False  # whether the call has reached the backend


@dataclass(slots=True)
class Place:
    """Where the present call stands, as far as somebody says it; `step` None: nobody does."""

    owner: _Owner  # the thread or asyncio task
    home: Home  # where the runs of this caller are kept
    key: Hashable  # identity of the generation, compared by `is`
    step: int | None  # step of the generation, from 0
    num_steps: int | None  # steps of the generation, where known
    branch: str | None  # name of the guidance branch, where somebody named it
    transformer: str  # label of the transformer, for the trace
    follower: Follower | None  # the attached pipeline that makes the call, if any
    said: Said | None  # what that one says of it


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
        self.aside = Home()  # for calls in the midst of a generation that are no part of it
        # what graphs have returned last, by the tensors' ids: the tensor, the transformer's state, and the graph
        self.outputs: dict[int, tuple[weakref.ref, weakref.ref, Hashable]] = {}

    def is_of(self, thread: object, task: asyncio.Task | None) -> bool:
        if self._thread is not thread:
            return False
        return self._task is None if task is None else self._task is not None and self._task() is task


# The one that was made current last is the last. No tokens: generators end in any order, servers may end them in a copied
# context.
_generations: ContextVar[tuple[Generation, ...]] = ContextVar("ras_compile_generations", default=())
_attached: ContextVar[AttachedCall | None] = ContextVar("ras_compile_attached_call", default=None)
_here = _Here()
_owner: ContextVar[_Owner | None] = ContextVar("ras_compile_owner", default=None)


def generation(num_steps: int | None = None) -> Generation:
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
    return Generation(num_steps)


def _running() -> tuple[Generation, ...]:
    """The generations that this context has entered and that have not ended, the current one at the end."""
    return tuple(generation for generation in _generations.get() if not generation.ended)


@contextmanager
def attached_call(call: AttachedCall) -> Iterator[None]:
    """For `attach`: everything inside is one call of the attached transformer."""
    token = _attached.set(call)
    try:
        yield
    finally:
        _attached.reset(token)


def note_reached() -> Said | None:
    """Note that the call that is running has reached the backend; returns what the attached pipeline says of it, if it has one."""
    call = _attached.get()
    for entered in _running()[-1:]:
        entered.reached = True
    if call is None:
        return None
    call.reached = True
    return call.said


def leave_attached() -> None:
    """The present call is of another loop than that of the attached pipeline that it seemed to be of."""
    call = _attached.get()
    if call is not None:
        call.follower.leave()
        call.said = None


def owner() -> _Owner:
    """The home of the running thread or asyncio task. Contexts are copied into tasks and threads; a home is not."""
    task = asyncio.current_task() if asyncio._get_running_loop() is not None else None
    found = _owner.get()
    if found is None or not found.is_of(_here.thread, task):
        found = _Owner(_here.thread, task)
        _owner.set(found)
    return found


def locate() -> Place:
    """Where the call stands that is running. Asked once for each call, which with that has reached the backend."""
    here, call = owner(), _attached.get()
    explicit = None
    for entered in _generations.get():  # the last one that has not ended
        explicit = explicit if entered.ended else entered
    key = step = num_steps = branch = follower = said = None
    name: str = "transformer"
    home: Home = here
    if call is not None:
        call.reached = True
        follower, said, branch, name = call.follower, call.said, call.branch, call.transformer
        if call.aside:
            home = here.aside
        if said is not None:
            key, step, num_steps = said.key, said.step, said.num_steps
    if explicit is not None:
        explicit.reached = True
        home, branch = explicit, explicit.branch_name or branch
        num_steps = explicit.num_steps if explicit.num_steps is not None else num_steps
        if explicit.current is not None:
            key, step, num_steps = explicit.key, explicit.current, explicit.num_steps
        elif said is None:
            key = explicit.key
    return Place(here, home, key, step, num_steps, branch, name, follower, said)
