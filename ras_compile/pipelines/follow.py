"""Following a pipeline: its scheduler says the step, its cache contexts name the guidance branches.

Only host values are read: `step_index`, the identity of `timesteps`, and a count of the calls of `step` for schedulers
that have no `step_index` (DDIM, DDPM, PNDM, CogVideoX's).
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ras_compile.config import RASConfig
from ras_compile.notices import warn_once
from ras_compile.passes.algebra.tokens import TokenView
from ras_compile.pipelines.clean import CleanHold, Draws
from ras_compile.pipelines.sample import picture_window, sample_map
from ras_compile.pipelines.samplers import check_clean
from ras_compile.sampling.branches import intact, same_tensor, tensor_mark
from ras_compile.sampling.clock import Evaluation, owner

__all__ = ["SchedulerFollower", "follow_branches", "present_branch", "unfollow_branches"]

_branch: ContextVar[str | None] = ContextVar("ras_compile_cache_context", default=None)
_STEPS = "_ras_compile_steps"
_PLAIN = "_ras_compile_plain_class"
# Model calls of one step that are remembered until the scheduler steps.
_CALLS = 16
_DEFAULTS = RASConfig()


@dataclass
class _Steps:
    """What a watched scheduler has done, and who watches it."""

    taken: int = 0
    followers: list[SchedulerFollower] = field(default_factory=list)


@functools.cache
def _watched(base: Any) -> type:
    """`base` with a `step` that counts, under the same name and signature; copies and pickles are plain `base` again.

    A class, because a function put on the instance would go into a deep copy and step the original from there.
    """
    order = list(inspect.signature(base.step).parameters)[1:]

    @functools.wraps(base.step)
    def step(self, *args, **kwargs):
        steps = _steps_of(self)
        if steps is None:  # made by this class, as in `type(pipe.scheduler).from_config(...)`
            return base.step(self, *args, **kwargs)
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        for follower in steps.followers:
            given[order[0]] = follower.stepping(self, given)
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


def _steps_of(scheduler: Any) -> _Steps | None:
    return getattr(scheduler, "__dict__", {}).get(_STEPS)


class SchedulerFollower:
    """Says the step of a pipeline's transformer calls; looks the scheduler up afresh at each call.

    Args:
        pipe: the pipeline; held weakly. When it is gone, the scheduler it had last is followed for those that share it.
        config: the options of generations that begin now; may be replaced at any time.
        transformers: the attached transformers, by the names they have in the pipeline; held weakly.
    """

    def __init__(
        self, pipe: Any, config: RASConfig = _DEFAULTS, transformers: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.config = config
        self._transformers = weakref.WeakValueDictionary(transformers or {})
        self._pipe = weakref.ref(pipe)
        self._scheduler: Any = None
        self._timesteps: Any = None
        self._count = 0  # of them
        self._key = object()
        self._origin: int | None = None
        self._taken_before = 0
        self._evaluations: list[Evaluation] = []
        self._windows: dict[int, slice | None] = {}
        self._asked = False
        self._previous: Tensor | None = None
        self._overwritten: Tensor | None = None
        self._returned: tuple[weakref.ref, int | None] | None = None
        self._handed_on = self._missed = False
        self._runner: weakref.ref | None = None
        self._left = False
        self._begin()
        self._watch(getattr(pipe, "scheduler", None))

    def tick(self) -> tuple[object, int, int | None] | None:
        """(identity of the generation, step from 0, number of steps); None when the scheduler cannot say, or is done.

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
        if not taken and timesteps is self._unset:
            return None
        if timesteps is not self._timesteps:
            self._timesteps, self._key, self._origin, self._taken_before = timesteps, object(), None, taken
            self._count = len(timesteps)
            self._begin()
        since = taken - self._taken_before
        index = getattr(scheduler, "step_index", None)
        first = getattr(scheduler, "begin_index", None) or 0
        count = self._count - first
        if not self._runs_here():
            return None
        if index is None:
            # no step has been taken, or the scheduler does not count them
            return self._key, since, count
        if self._origin is None:
            self._origin = index - since
        return self._key, index - self._origin, count

    def time(self) -> Tensor | None:
        """The present entry of `timesteps`, exact and unscaled, 0-d; None when there is none."""
        if self._timesteps is None or not self._runs_here():
            return None
        return self._timesteps[self._index()]

    def leave(self) -> None:
        """The present calls are of another loop: nothing is said until the scheduler steps again, or is set anew."""
        self._left = True
        self._evaluations = []

    def late(self) -> bool:
        """Whether the run began after the first entry of `timesteps`, as image-to-image does."""
        return bool(self._origin or getattr(self._scheduler, "begin_index", None))

    def check_clean(self) -> None:
        """Refuse a scheduler of which the clean sample cannot be told.

        Raises:
            ConfigError: the text lists those of which it can.
        """
        check_clean(self._scheduler)

    def refusal(self) -> str:
        """Why no step of this generation may be sparse; empty where nothing is known against it."""
        return self._clean.refusal if self._runs_here() else ""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Take one model call of the present step."""
        if self._runs_here():
            self._evaluations = [*self._evaluations[1 - _CALLS :], evaluation]

    def window(self, latent: Tensor) -> slice | None:
        """The tokens of a packed latent [B, N, C] that are the picture, as the scheduler's steps have shown it.

        None: all of them, or not known yet. What the generation before has shown is taken for its first call.
        """
        if latent.dim() != 3 or not self._windows or self.tick() is None:
            return None
        return self._windows.get(latent.shape[1])

    def overwritten(self, view: TokenView, latent: Tensor) -> Tensor | None:
        """Tokens that the pipeline has put back after every step so far (the known part of inpainting): bool [B, N].

        Where a pipeline steps what the scheduler returned, nothing is ever compared; else the first answer of a
        generation is a host read. None: none of them.
        """
        if self._overwritten is None or not self._runs_here():
            return None
        if not self._asked:
            self._asked = True
            if not bool(self._overwritten.any()):
                self._untouched()
                return None
        mapped = sample_map(view, latent.shape, self._overwritten.shape)
        return mapped.to_tokens(self._overwritten) if mapped else None

    def replaced(self) -> bool:
        """Whether a callback has put another latent in place of what the last step returned, or has written into it.

        Only where the pipeline steps on with the very tensor that a step returns, as it has done until then. One that a
        callback leaves alive besides is noticed a step late.
        """
        if self._returned is None or not self._runs_here():
            return False
        return self._missed or (self._handed_on and not intact(self._returned))

    def stepping(self, scheduler: Any, given: dict[str, Any]) -> Any:
        """The scheduler is about to step with the arguments `given`; returns the `model_output` that it is to take."""
        self._runner, self._left = weakref.ref(owner()), False
        self._look_for_other_transformers()
        evaluations, self._evaluations = self._evaluations, []
        prediction, sample = next(iter(given.values())), given.get("sample")
        if not isinstance(sample, Tensor) or not isinstance(prediction, Tensor):
            return prediction
        self._look_for_reference_tokens(evaluations, sample)
        self._look_for_overwriting(sample)
        if self._returned is not None:
            handed_on = same_tensor(self._returned, sample)
            self._missed = self._handed_on and not handed_on and not self.replaced()
            self._handed_on = handed_on
        return self._clean.stepping(scheduler, given, prediction, sample, evaluations)

    @property
    def asks(self) -> bool:
        """Whether it matters if the step that begins draws random numbers."""
        return self._clean.asks

    def stepped(self, result: Any, drawn: bool) -> None:
        """The scheduler has stepped and returns `result`; whether it has drawn random numbers, where that is asked."""
        self._clean.stepped(self._scheduler, drawn)
        first = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
        sample = first if isinstance(first, Tensor) else None
        self._returned = None if sample is None else tensor_mark(sample)
        if self._overwrites:
            self._previous = sample

    def _begin(self) -> None:
        """A generation begins."""
        self._clean = CleanHold()
        self._looked = self._asked = False
        self._overwrites = True
        self._previous = self._overwritten = self._returned = None
        self._handed_on = self._missed = False
        self._runner, self._left = None, False

    def _runs_here(self) -> bool:
        """Whether the present call can be of the run that the scheduler steps.

        What comes after its last step, or from another thread or task, is a loop with another scheduler, or with none.
        """
        if self._left or (self._timesteps is not None and self._index() >= self._count):
            return False
        return self._runner is None or self._runner() is owner()

    def _index(self) -> int:
        """The present place in `timesteps`."""
        index = getattr(self._scheduler, "step_index", None)
        if index is None:
            steps = _steps_of(self._scheduler)
            since = steps.taken - self._taken_before if steps else 0
            index = (getattr(self._scheduler, "begin_index", None) or 0) + since
        return index

    def _untouched(self) -> None:
        self._overwrites, self._previous, self._overwritten = False, None, None

    def _look_for_reference_tokens(self, evaluations: Sequence[Evaluation], sample: Tensor) -> None:
        """Once in a generation: which tokens of the packed latents does the scheduler know?"""
        if self._looked or not evaluations:
            return
        self._looked = True
        for latent in [evaluation.latent for evaluation in evaluations]:
            if latent.dim() == sample.dim() == 3:
                self._windows[latent.shape[1]] = picture_window(latent, sample)

    def _look_for_other_transformers(self) -> None:
        """A transformer that has been put in the place of an attached one since is not compiled."""
        pipe = self._pipe()
        for name, attached in list(self._transformers.items()):
            if getattr(pipe, name, None) not in (None, attached):
                warn_once(
                    f"ras_compile: {type(pipe).__name__}.{name} is not the module that was attached; what it computes is "
                    "dense. Call detach() on the handle, and attach again."
                )

    def _look_for_overwriting(self, sample: Tensor) -> None:
        """Compare what is stepped now with what the step before returned."""
        previous, self._previous = self._previous, None
        if previous is None or not self._overwrites:
            return
        if previous is sample or previous.shape != sample.shape:
            self._untouched()
            return
        changed = sample != previous.to(sample.dtype)
        self._overwritten = changed if self._overwritten is None else changed & self._overwritten

    def stop(self) -> None:
        """Give the scheduler its own class back."""
        self._watch(None)

    def _watch(self, scheduler: Any) -> None:
        before = _steps_of(self._scheduler)
        if before is not None:
            before.followers.remove(self)
            if not before.followers:
                self._scheduler.__class__ = _plain_class(self._scheduler)
                delattr(self._scheduler, _STEPS)
        self._scheduler, self._timesteps = scheduler, None
        # a scheduler has timesteps from the beginning, of its training, and this once they are those of a run
        is_set = getattr(scheduler, "num_inference_steps", None) is not None
        self._unset = None if is_set else getattr(scheduler, "timesteps", None)
        if not callable(getattr(type(scheduler), "step", None)):
            return
        steps = _steps_of(scheduler)
        if steps is None:
            scheduler.__class__ = _watched(_plain_class(scheduler))
            steps = _Steps()
            setattr(scheduler, _STEPS, steps)
        steps.followers.append(self)


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
