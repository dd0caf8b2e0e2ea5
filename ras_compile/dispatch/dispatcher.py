"""The one way from a model call to its step: find the plan that fits the call, pack the call, run the step.

Both ways of capture come here: :class:`~ras_compile.backend.CompiledGraph`, a graph that Dynamo captured whole, and
:class:`~ras_compile.dispatch.traced.TracedModel`, a model that Dynamo breaks and that is traced instead. They differ in how a
plan is made and in whether Dynamo guards it.

    key of the call -> entries, each a plan and a guard -> the entry that fits -> its plan for the picture's tokens -> the step
"""

from __future__ import annotations

import copy
import logging
import operator
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ras_compile._torch import original
from ras_compile.capture.inputs import GraphInput, find_timestep
from ras_compile.config import RASConfig
from ras_compile.dispatch.agreement import agree, disconnected
from ras_compile.dispatch.callers import called_pipeline, compiled_call
from ras_compile.dispatch.kinds import GraphBreak
from ras_compile.errors import RASError, SpecViolation, UnsupportedGraph
from ras_compile.execute.compiling import compiling
from ras_compile.execute.memory import free_memory
from ras_compile.notices import REFUSED, fell_back, first_time, warn_once
from ras_compile.plans.plan import Plan
from ras_compile.sampling.calls import CallInfo, Decision
from ras_compile.sampling.locate import Place, locate
from ras_compile.sampling.registry import probes_of, state_for
from ras_compile.sampling.state import TransformerState

log = logging.getLogger(__name__)

PLANS = 32  # sets of sizes of one graph whose programs stay; those used longest ago go


class Entry:
    """A plan, and the calls that it is for: those of one key. What must hold beside the key Dynamo has seen to.

    Args:
        users: positions of the inputs that are no weights and tell calls apart.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[GraphInput],
        values: Sequence[Any],
        users: Sequence[int],
        config: RASConfig,
    ) -> None:
        self.inputs, self.config = inputs, config
        self.timestep = find_timestep(inputs, values, config.timestep)
        self.windows: dict[tuple[int, int], Entry] = {}  # by the tokens that are the picture
        self.used = time.monotonic()  # seconds, at its last call
        self._users = users
        self._recent: tuple[tuple[weakref.ref, ...], weakref.ref] | None = None  # probes of a transformer, its state
        self._takes(plan)
        agree(plan, inputs, values, config)

    def _takes(self, plan: Plan) -> None:
        self.plan, frame = plan, plan.analysis.frame
        self._sizes, self._group = (frame.samples, frame.tokens, frame.grid), frame.group
        # the sizes that Dynamo hands over beside the tensors tell no more than those do
        told = [
            index for index in self._users if not self.inputs[index].size or self.inputs[index].argument is not None
        ]
        self.context = entries_at([index for index in told if index not in (plan.latent, self.timestep)])

    def with_plan(self, plan: Plan) -> Entry:
        """The same calls with another plan."""
        other = copy.copy(self)
        other._takes(plan)
        return other

    def cost(self) -> Any:
        """FLOPs of the plan's programs."""
        return self.plan.cost

    def run(self, given: Sequence[Any], own: Sequence[Any], weights: Sequence[Tensor], place: Place) -> list[Any]:
        """Runs the dense or the sparse program for a call, as its step wants it; returns the graph's outputs.

        Args:
            given: the inputs, as the plan's graph takes them.
            own: the same as the user's own objects; Python numbers are tensors among ``given`` alone.
            weights: they say which transformer it is.
        """
        try:
            return self._run(given, own, weights, place)
        except RuntimeError as error:
            if self._group is None or isinstance(error, RASError):
                raise
            raise disconnected(error, self._group) from error

    def _run(self, given: Sequence[Any], own: Sequence[Any], weights: Sequence[Tensor], place: Place) -> list[Any]:
        plan, info, state = self.plan, self.info(own, weights), self.state_of(weights)
        decision = state.decide(info, place)
        outputs: list[Any] | None = None
        try:
            if decision.rows is None:
                outputs = plan.dense(given, decision.slots, decision.spare)
            else:
                outputs = plan.run_sparse(given, decision.rows, decision.slots)
        except torch.OutOfMemoryError as error:
            if info.group is not None:  # a step of another kind here alone would hang the other processes
                state.fail(decision)
                raise
            fell_back("a step run dense and without caches, for which there was no memory", error)
        except BaseException:
            state.fail(decision)
            raise
        if outputs is None:  # outside of the handler: the error's traceback holds the tensors of the call that failed
            return self._without_caches(given, info, state, decision)
        state.record(info, decision, plan.cached_noise(decision.slots), outputs, plan.noise_view)
        if decision.time is not None:
            state.extrapolate(info, decision, outputs[plan.noise], plan.noise_view)
            if plan.spread is not None and decision.rows is not None:
                plan.spread.share(outputs[plan.noise])
        return outputs

    def _without_caches(
        self, given: Sequence[Any], info: CallInfo, state: TransformerState, decision: Decision
    ) -> list[Any]:
        """Runs a step whose caches did not fit: what nobody needs is given up, nothing is kept, and the next step tries again."""
        warn_once(
            "ras_compile: the device has no memory left for the caches: such steps run dense, and the picture is right. Lower "
            "cache_budget, make the batch or the picture smaller, or offload other models."
        )
        try:
            decision.slots.clear()  # half written
            free_memory()
            outputs = self.plan.bare(given)
        except BaseException:
            state.fail(decision)
            raise
        decision.kind, decision.rows, decision.active = "dense", None, info.tokens
        decision.reason = "there was no memory for the caches"
        state.record(info, decision, None, None)
        return outputs

    def info(self, own: Sequence[Any], weights: Sequence[Tensor]) -> CallInfo:
        """The call as the state of its transformer sees it, with the user's own objects."""
        plan, time = self.plan, self.timestep
        return CallInfo(
            plan.identity, own[plan.latent], self.context(own), None if time is None else own[time], *self._sizes,
            plan.latent_view, self.cost, weights, plan.spread, self._group,
        )  # fmt: skip

    def state_of(self, weights: Sequence[Tensor]) -> TransformerState:
        """The state of the call's transformer; that of the last call, as a rule, and a weight never changes its owner."""
        if self._recent is not None:
            (first, middle, last), known = self._recent
            if first() is weights[0] and middle() is weights[len(weights) // 2] and last() is weights[-1]:
                state = known()
                if state is not None:
                    return state
        state = state_for(weights, self.config)
        if weights:
            self._recent = tuple(map(weakref.ref, probes_of(weights))), weakref.ref(state)
        return state


@dataclass(frozen=True)
class Refusal:
    """Why calls of one key run dense."""

    error: UnsupportedGraph | SpecViolation  # it says why
    timestep: int | None = None  # position of the timestep among the inputs; None where there is none
    hooked: weakref.ref | None = None  # the part of the model that has hooks, if that is why: it may lose them


def without_traceback(error: UnsupportedGraph | SpecViolation) -> UnsupportedGraph | SpecViolation:
    """The same sentence in an error that can be kept: a traceback keeps the frames of the call, and with them the model."""
    return UnsupportedGraph(str(error)) if isinstance(error, UnsupportedGraph) else SpecViolation(str(error))


_AnEntry = TypeVar("_AnEntry", bound=Entry)


class Dispatcher(Generic[_AnEntry]):
    """The plans of one capture, by the key of a call."""

    def __init__(self, config: RASConfig) -> None:
        self.config = config
        self.plans: dict[tuple, list[_AnEntry]] = {}
        self.refused: dict[tuple, Refusal] = {}

    def keep(self, key: tuple, entry: _AnEntry) -> None:
        """Keeps a new entry; those of the sizes that were used longest ago go, where there are many. Says that it compiles."""
        latent = list(entry.plan.analysis.latent.meta["val"].shape)
        known = sum(map(bool, self.plans.values()))
        log.info("compiling for a latent %s; sets of sizes that this graph has had before: %s", latent, known)
        self.plans[key] = [*self.plans.get(key, ()), entry]  # last: other threads look there
        while len(self.plans) > PLANS:
            last = {known: max((each.used for each in entries), default=0.0) for known, entries in self.plans.items()}
            oldest = min(last, key=last.__getitem__)
            del self.plans[oldest]
            log.info("programs of the sizes used longest ago are dropped: more than %s sets of sizes", PLANS)

    def plan_for(self, entry: _AnEntry, values: Sequence[Any], config: RASConfig) -> Plan:
        """A plan of the capture behind an entry under other options.

        Raises:
            UnsupportedGraph: there is none.
        """
        raise NotImplementedError

    def run(self, entry: _AnEntry, given: Sequence[Any], own: Sequence[Any], weights: Sequence[Tensor]) -> list[Any]:
        """Runs the step of a call; see :meth:`Entry.run`."""
        place, entry.used = locate(), time.monotonic()
        if place.said is not None and self.config.region is None:
            latent = own[entry.plan.latent]
            window = place.said.windows.get(latent.shape[1]) if latent.dim() == 3 else None
            if window is not None:
                tokens = window.start, window.stop
                narrow = entry.windows.get(tokens) or self._windowed(entry, given, tokens)
                return narrow.run(given, own, weights, place)
        return entry.run(given, own, weights, place)

    def _windowed(self, entry: _AnEntry, given: Sequence[Any], place: tuple[int, int]) -> Entry:
        """The entry of a latent in which the attached scheduler knows only some tokens, the picture.

        A model that cannot be planned so is planned as before: all tokens count as the picture.
        """
        with compiling():
            if place not in entry.windows:
                try:
                    narrow = self.plan_for(entry, given, replace(self.config, region=slice(*place)))
                    entry.windows[place] = entry.with_plan(narrow)
                except (UnsupportedGraph, SpecViolation) as error:
                    fell_back("a window of tokens computed with the rest", error)
                    entry.windows[place] = entry
            return entry.windows[place]

    def refuse(self, error: UnsupportedGraph | SpecViolation, model: nn.Module | None = None) -> None:
        """Says once that a model runs dense, and why.

        Args:
            model: the model; None: the stack says which one is called.

        Raises:
            UnsupportedGraph: if the option ``unsupported`` wants that.
        """
        if self.config.unsupported == "error":
            raise error
        fell_back(REFUSED, error)
        if model is None:
            found = compiled_call()
            model = None if found is None else original(found[0])
        pipeline = called_pipeline() if model is None else None
        if pipeline is not None:
            text = (
                f"torch.compile was given a whole {pipeline}, which runs dense; use ras_compile.attach(pipe) instead."
            )
            return warn_once(f"ras_compile: {text}")
        name = "this model" if model is None else type(model).__name__
        if isinstance(error, GraphBreak) and not first_time((name, error.where)):
            return  # the parts on the other side of a break that was told say no more
        warn_once(f"ras_compile: {name} runs dense: {error}")

    def tell_dense(
        self, weights: Sequence[Tensor], refusal: Refusal, values: Sequence[Any], known: TransformerState | None = None
    ) -> TransformerState:
        """Records a call that ran past every plan, so that :func:`ras_compile.trace` tells it.

        Args:
            known: the state to which an earlier call of the same transformer was told; see :func:`state_for`.
        """
        timestep = None if refusal.timestep is None else values[refusal.timestep]
        state = state_for(weights, self.config, known)
        state.passed(str(refusal.error), timestep)
        return state


def key_of(values: Iterable[Any]) -> tuple:
    """What programs are made for: sizes, strides, types and devices of tensors; other arguments by their type and text."""
    return tuple(
        [(v.shape, v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else (type(v), str(v)) for v in values]
    )


def packed(value: Tensor) -> Tensor:
    """A tensor with the strides of one that was made as it is: another view of its memory where that can be had."""
    step = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if stride != step:
            # contiguous first: what has one stride throughout, as every second channel, is flat with that stride
            return value.contiguous().reshape(-1).view(value.shape)
        step *= max(size, 1)
    return value


def entries_at(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes the entries at ``places`` out of a sequence; without Python for each of them: a call has hundreds of weights."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda whole: tuple([whole[place] for place in places])


def worth_tracing(error: UnsupportedGraph, values: Iterable[Any]) -> bool:
    """Whether a model that is refused as Dynamo captures it may be supported if it is traced with what its code reads.

    That is so where Dynamo broke its graph, and where an argument may say where tokens stand: a vector of whole numbers.
    """
    return isinstance(error, GraphBreak) or places_given(values)


def places_given(values: Iterable[Any]) -> bool:
    """Whether an argument may say where tokens stand: a vector of whole numbers."""
    return any(
        isinstance(v, Tensor) and v.ndim == 1 and len(v) > 1 and v.dtype in (torch.int64, torch.int32) for v in values
    )
