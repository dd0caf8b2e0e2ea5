"""Following a pipeline: its scheduler says the step, its cache contexts name the guidance branches.

Only host values are read: `step_index`, the identity of `timesteps`, and a count of the calls of `step` for schedulers
that have no `step_index` (DDIM, DDPM, PNDM, CogVideoX's).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ras_compile._torch import compiled_call, original
from ras_compile.config import RASConfig
from ras_compile.dispatch.traced import Exchangeable
from ras_compile.notices import warn_once
from ras_compile.passes.algebra.tokens import TokenView
from ras_compile.pipelines.call_sites import CallSites
from ras_compile.pipelines.clean import CleanHold
from ras_compile.pipelines.clock import Clock
from ras_compile.pipelines.sample import picture_window, sample_map
from ras_compile.pipelines.samplers import check_clean, noise_levels, velocity_terms
from ras_compile.pipelines.watched import steps_of, unwatch, watch
from ras_compile.sampling.branches import intact, same_tensor, tensor_mark
from ras_compile.sampling.locate import Evaluation, Said, owner

_branch: ContextVar[str | None] = ContextVar("ras_compile_cache_context", default=None)
# Model calls of one step that are remembered until the scheduler steps.
_CALLS = 16
_HOST = torch.device("cpu")
_DEFAULTS = RASConfig()


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
        self.config, self.sites, self.clock = config, CallSites(), Clock()
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
        self.picture: Any = None
        self.exchanged = ""  # the name of a transformer that took an attached one's place since the generation began
        # whether a call of this generation has reached the backend, and how many ran past it
        self.reached, self.passed = False, 0
        self._left = False
        self._begin()
        self._watch(getattr(pipe, "scheduler", None))

    def locate(self) -> Said | None:
        """Where the present call stands; None when the scheduler cannot say, is done, or steps another loop.

        A generation is one `timesteps` object: `set_timesteps` makes a new one. The step counts from the entry of
        `timesteps` at which the generation began (image-to-image begins late).
        """
        pipe = self._pipe()
        scheduler = self._scheduler if pipe is None else getattr(pipe, "scheduler", None)
        if scheduler is not self._scheduler:
            self._watch(scheduler)
        timesteps, steps = getattr(scheduler, "timesteps", None), steps_of(scheduler)
        if timesteps is None or steps is None or (not steps.taken and timesteps is self._unset):
            return None
        if timesteps is not self._timesteps:
            self._timesteps, self._key, self._origin, self._taken_before = timesteps, object(), None, steps.taken
            self._count = len(timesteps)
            self._begin()
            self.clock.begin(timesteps.device if isinstance(timesteps, Tensor) else _HOST)
        since = steps.taken - self._taken_before
        first = getattr(scheduler, "begin_index", None) or 0
        index = getattr(scheduler, "step_index", None)
        if index is not None and self._origin is None:
            self._origin = index - since
        entry = first + since if index is None else index
        # what comes after the last step, or from another thread or task, is a loop with another scheduler, or with none
        if self._left or entry >= self._count or (self._runner is not None and self._runner() is not owner()):
            return None
        # without an index no step has been taken, or the scheduler does not count them
        step = since if index is None else index - (self._origin or 0)
        return Said(
            key=self._key,
            step=step,
            num_steps=self._count - first,
            late=bool(self._origin or first),
            times=timesteps,
            entry=entry,
            windows=self._windows,
            refusal=self._clean.refusal,
            replaced=self._replaced(),
        )

    def leave(self) -> None:
        """The present calls are of another loop: nothing is said until the scheduler steps again, or is set anew."""
        self._left = True
        self._evaluations = []

    def check_clean(self) -> None:
        """Refuse a scheduler of which the clean sample cannot be told.

        Raises:
            ConfigError: the text lists those of which it can.
        """
        check_clean(self._scheduler)

    def noise_levels(self) -> Sequence[float]:
        """How much of the latent is noise, in [0, 1], at each of the timesteps and at the end; read from the device."""
        return noise_levels(self._scheduler)

    def velocity_terms(self) -> Sequence[tuple[float, float]]:
        """Scale and shift of the velocity that the model's prediction stands for, at each of the timesteps; see `velocity.py`."""
        return velocity_terms(self._scheduler)

    def evaluated(self, evaluation: Evaluation) -> None:
        """Take one model call of the present step."""
        self._evaluations = [*self._evaluations[1 - _CALLS :], evaluation]

    def overwritten(self, view: TokenView, latent: Tensor) -> Tensor | None:
        """Tokens that the pipeline has put back after every step so far (the known part of inpainting): bool [B, N].

        Where a pipeline steps what the scheduler returned, nothing is ever compared; else the first answer of a
        generation is a host read. None: none of them.
        """
        if self._overwritten is None:
            return None
        if not self._asked:
            self._asked = True
            if not bool(self._overwritten.any()):
                self._untouched()
                return None
        mapped = sample_map(view, latent.shape, self._overwritten.shape)
        return mapped.to_tokens(self._overwritten) if mapped else None

    def _replaced(self) -> bool:
        """Whether a callback has put another latent in place of what the last step returned, or has written into it.

        Only where the pipeline steps on with the very tensor that a step returns, as it has done until then. One that a
        callback leaves alive besides is noticed a step late.
        """
        if self._returned is None:
            return False
        return self._missed or (self._handed_on and not intact(self._returned))

    def stepping(self, scheduler: Any, given: dict[str, Any], loop: FrameType | None) -> Any:
        """`loop` steps the scheduler with the arguments `given`; returns the `model_output` that it is to take."""
        self.sites.stepping(loop)
        self._runner, self._left = weakref.ref(owner()), False
        self._look_for_other_transformers()
        evaluations, self._evaluations = self._evaluations, []
        prediction, sample = next(iter(given.values())), given.get("sample")
        if not isinstance(sample, Tensor) or not isinstance(prediction, Tensor):
            return prediction
        self.clock.see(prediction)
        self._look_for_reference_tokens(evaluations, sample)
        self._look_for_overwriting(sample)
        if self._returned is not None:
            handed_on = same_tensor(self._returned, sample)
            self._missed = self._handed_on and not handed_on and not self._replaced()
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
        self.clock.tick(_HOST if sample is None else sample.device)
        if self._overwrites:
            self._previous = sample

    def _begin(self) -> None:
        """A generation begins."""
        self.sites.begin()
        self._clean = CleanHold()
        self._looked = self._asked = False
        self._overwrites = True
        self._previous = self._overwritten = self._returned = None
        self._handed_on = self._missed = False
        self._runner, self._left = None, False
        self.picture, self.video, self.exchanged = None, False, ""
        self.reached, self.passed = False, 0

    def pictured(self, picture: Any, video: bool) -> None:
        """The pipeline has decoded what it drew: it is held, as it is, until the next generation begins."""
        self.picture, self.video = picture, video

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
        """A transformer that has been put in the place of an attached one since is not compiled; one around it calls it."""
        pipe = self._pipe()
        for name, attached in list(self._transformers.items()):
            present = getattr(pipe, name, None)
            within = isinstance(present, nn.Module) and original(present) is attached
            if within and (present is not attached or not isinstance(compiled_call(attached), Exchangeable)):
                warn_once(
                    f"ras_compile: {type(pipe).__name__}.{name} was compiled once more after attach(); the options of that "
                    "compilation rule. Put the plain module back, or call detach() on the handle."
                )
            elif present is not None and not (isinstance(present, nn.Module) and attached in present.modules()):
                self.exchanged = name
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
        unwatch(self._scheduler, self)
        self._scheduler, self._timesteps = scheduler, None
        # a scheduler has timesteps from the beginning, of its training, and this once they are those of a run
        is_set = getattr(scheduler, "num_inference_steps", None) is not None
        self._unset = None if is_set else getattr(scheduler, "timesteps", None)
        watch(scheduler, self)


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


def follow_pictures(pipe: Any, follower: SchedulerFollower) -> None:
    """Notice the pictures that a pipeline returns, where its processor makes them from what the decoder gave."""
    for processor, name in _processors(pipe):

        def processed(self, *args, _name=name, **kwargs):
            result = getattr(type(self), _name)(self, *args, **kwargs)
            follower.pictured(result, _name == "postprocess_video")
            return result

        vars(processor)[name] = MethodType(processed, processor)


def unfollow_pictures(pipe: Any) -> None:
    """Undo `follow_pictures`."""
    for processor, name in _processors(pipe):
        vars(processor).pop(name, None)


def _processors(pipe: Any) -> list[tuple[Any, str]]:
    """What makes a pipeline's pictures and videos, with the name of the method that does."""
    places = {"image_processor": "postprocess", "video_processor": "postprocess_video"}
    found = [(getattr(pipe, place, None), name) for place, name in places.items()]
    return [(processor, name) for processor, name in found if callable(getattr(type(processor), name, None))]


def unfollow_branches(transformer: nn.Module) -> None:
    """Undo `follow_branches`."""
    vars(transformer).pop("cache_context", None)
