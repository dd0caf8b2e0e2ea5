"""The backend itself: `torch.compile(transformer, backend="ras", options={...})`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile._torch import RESUME_PREFIX, why_graph_ends
from ras_compile.canaries import check as check_pytorch
from ras_compile.capture.attributes import PerAttributes, attribute_positions
from ras_compile.capture.inputs import describe_inputs, find_timestep, key_of
from ras_compile.capture.numbers import as_tensors, number_positions
from ras_compile.capture.subclasses import Entrance
from ras_compile.config import RASConfig
from ras_compile.dispatch.callers import LIBRARIES, compiled_call, holder, is_call, receiver
from ras_compile.dispatch.traced import falling_back, places_given, take_over
from ras_compile.errors import RASError, SpecViolation, UnsupportedGraph
from ras_compile.execute.compiling import compiling
from ras_compile.execute.inner import Compiled, compile_inner, start_workers
from ras_compile.notices import first_time, warn_once
from ras_compile.plans.family import Families
from ras_compile.plans.plan import Plan
from ras_compile.sampling.blocks import feeds_a_block, why_block
from ras_compile.sampling.locate import Said, note_reached
from ras_compile.sampling.registry import Part
from ras_compile.sampling.steps import run_step

log = logging.getLogger(__name__)


def ras(graph: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode=None):
    """Entry point for Dynamo: compiles one graph for region-adaptive sampling (RAS, arXiv 2502.10389).

    Args:
        graph: the graph of a whole transformer, from the latent to its noise.
        example_inputs: Dynamo's example inputs; shapes are read when the graph is called.
        options: see :class:`RASConfig`.
        mode: torch.compile's mode, handed on to the inner backend.

    Raises:
        RASError: an unknown option, a bad value, or a PyTorch on which nothing can be compiled; at the first call, since
            Dynamo would wrap it in an error of its own.
    """
    try:
        config = RASConfig.from_options({**(options or {}), **({"mode": mode} if mode else {})})
        check_pytorch()
    except RASError as error:
        return _raising(error)
    start_workers(example_inputs, config)

    def make(graph: fx.GraphModule, inputs: Sequence[Any]) -> CompiledGraph:
        return CompiledGraph(graph, inputs, config)

    places = attribute_positions(graph.graph)
    return PerAttributes(graph, places, example_inputs, make) if places else make(graph, example_inputs)


def _raising(error: RASError) -> Callable[..., Any]:
    def fail(*values: Any) -> Any:
        raise error

    return fail


class CompiledGraph:
    """What Dynamo calls in place of a graph: looks at the call's shapes and at its step, and runs the right program.

    Args:
        graph: the Dynamo graph; its sizes may be symbolic.
        example_inputs: inputs of it; of their classes alone.
        config: the options.
    """

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any], config: RASConfig) -> None:
        # the weights' places among what Dynamo gives
        self.held = [index for index, given in enumerate(describe_inputs(graph.graph)) if given.weight]
        self.entrance = Entrance(graph, example_inputs)
        self.graph = graph = self.entrance.graph
        self.config = config
        self.inputs = describe_inputs(graph.graph)
        self.weights = [index for index, given in enumerate(self.inputs) if given.weight]
        # a size that nothing reads, such as a view's offset in `timesteps`, tells neither programs nor branches apart
        unread = {index for index, node in enumerate(graph.graph.find_nodes(op="placeholder")) if not node.users}
        sizes = {index for index, given in enumerate(self.inputs) if given.size}
        self.users = [i for i, given in enumerate(self.inputs) if not given.weight and i not in sizes & unread]
        self.numbers = number_positions(self.inputs)
        self.broken = graph_break(graph) or fragment(len(self.held))
        self.placed: set[tuple] = set()  # calls that are refused, and whose arguments say where tokens stand
        self.told = False
        # why it is one block of a transformer, empty if it is not; None before the first call
        self.block: str | None = None
        self.parts: dict[tuple, Compiled] = {}  # for calls that are a part of a model's
        self.plans: dict[tuple, Plan | Compiled] = {}
        self.families = Families(graph, self.inputs, self.users)
        self._timesteps: dict[tuple, int | None] = {}

    def __call__(self, *held: Any) -> Sequence[Any]:
        said = note_reached()
        values = self.entrance(held)
        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values):
            self._refuse(
                UnsupportedGraph("gradients are being recorded; sample under torch.no_grad() or inference_mode()")
            )
            return self.graph(*values)
        if self.block or falling_back():
            return self._as_part(values)
        while True:
            given = as_tensors(values, self.numbers)
            key = self._key(given)
            plan = self.plans.get(key)
            if plan is not None:
                # a fragment whose model is called past its `TracedModel`: it was compiled anew, and Dynamo's code is the old
                if self.broken is not None and take_over(self.config):
                    return self.graph(*values)
                break
            if self.block is None:
                time = find_timestep(self.inputs, values, self.config.timestep)
                self.block = why_block(holder, None if time is None else values[time])
                if self.block:
                    self._refuse(UnsupportedGraph(self.block))
                    return self._as_part(values)
            if not self.told and (self.broken is not None or key in self.placed):
                traced = take_over(self.config)
                if traced:
                    return self.graph(*values)
                self.told = traced is not None
            with compiling():
                if key not in self.plans:
                    self._make(key, given)
        if not isinstance(plan, Plan):
            return plan(*given)
        if not self.weights:  # a hook, say; nothing would know it again at the next step
            return self._as_part(values)
        plan, key = self._windowed(plan, key, given, said)
        return self._run(plan, key, given, values, Part(held, self.held))

    def _as_part(self, values: Sequence[Any]) -> Sequence[Any]:
        """A block of a transformer, a fragment of one that is refused, or a hook of it, as it is."""
        if self.block:
            feeds_a_block(values[index] for index in self.users)
        key = self._key(values)
        if key not in self.parts:
            with compiling():
                if key not in self.parts:
                    self.parts[key] = self._dense(values)
        return self.parts[key](*values)

    def _windowed(self, plan: Plan, key: tuple, values: Sequence[Any], said: Said | None) -> tuple[Plan, tuple]:
        """The plan of a latent in which the attached scheduler knows only some tokens, the picture; and its key.

        A model that cannot be planned so is planned as before: all tokens count as the picture.
        """
        if self.config.region is not None or said is None or values[plan.latent].dim() != 3:
            return plan, key
        window = said.windows.get(values[plan.latent].shape[1])
        if window is None:
            return plan, key
        narrow = (*key, (window.start, window.stop))
        if narrow not in self.plans:
            with compiling():
                if narrow not in self.plans:
                    self._timesteps[narrow] = self._timesteps[key]
                    try:
                        self.plans[narrow] = self._plan(values, replace(self.config, region=window))
                    except (UnsupportedGraph, SpecViolation) as error:
                        log.info("the picture's tokens cannot be the region: %s", error)
                        self.plans[narrow] = plan
        found = self.plans[narrow]
        assert isinstance(found, Plan)
        return found, (narrow if found is not plan else key)

    def _run(self, plan: Plan, key: tuple, given: Sequence[Any], values: Sequence[Any], weights: Part) -> Sequence[Any]:
        time = self._timesteps[key]
        return run_step(
            plan,
            given,
            graph=plan.identity,
            latent=values[plan.latent],
            context=tuple([values[index] for index in self.users if index not in (plan.latent, time)]),
            timestep=None if time is None else values[time],
            weights=weights,
            config=self.config,
        )

    def _key(self, values: Sequence[Any]) -> tuple:
        """What a plan is specialised on: sizes, strides and types of the user's inputs, and numbers themselves."""
        return key_of([values[index] for index in self.users])

    def _plan(self, values: Sequence[Any], config: RASConfig) -> Plan:
        """The plan for a call, one that it shares with other lengths of the context if it can."""
        shared = self.families.plan(values, config, self.numbers)
        return Plan(self.graph, self.inputs, values, config) if shared is None else shared

    def _make(self, key: tuple, values: Sequence[Any]) -> None:
        """Makes the plan for ``key``; if integers were taken for numbers and are sizes, only says so: call again."""
        if self.broken is not None:
            # it is kept, and so never raised: its traceback would keep the frames of the call, and with them the model
            self._without_plan(key, values, self.broken)
            return
        try:
            plan = self._plan(values, self.config)
            self._timesteps[key] = find_timestep(self.inputs, values, self.config.timestep)
            self.plans[key] = plan  # last: other threads look there
        except (UnsupportedGraph, SpecViolation, TypeError) as error:
            self._without_plan(key, values, error)

    def _without_plan(self, key: tuple, values: Sequence[Any], error: Exception) -> None:
        """What becomes of a call that has no plan: another try, or the dense graph."""
        if self.numbers:
            self.numbers = []
        elif isinstance(error, UnsupportedGraph) and not (self.broken or key in self.placed) and places_given(values):
            self.placed.add(key)
        elif isinstance(error, (UnsupportedGraph, SpecViolation)):
            if not self.told:
                self._refuse(error)
            self.plans[key] = self._dense(values)
        else:
            raise error

    def _refuse(self, error: UnsupportedGraph | SpecViolation) -> None:
        if self.config.unsupported == "error":
            raise error.again() if isinstance(error, GraphBreak) else error
        found = compiled_call()
        name = "this model" if found is None else type(found[0]).__name__
        if isinstance(error, GraphBreak) and not first_time((name, error.where)):
            return  # the parts behind a break that was told say no more
        warn_once(f"ras_compile: {name} runs dense: {error}")

    def _dense(self, values: Sequence[Any]) -> Compiled:
        """The graph as it is, through the inner compiler where its sizes are static."""
        if any(given.size for given in self.inputs):
            return self.graph
        return compile_inner(self.graph, values, self.config)


def graph_break(graph: fx.GraphModule) -> GraphBreak | None:
    """The error of a graph that is only a part of the model's forward, because Dynamo broke it; None for a whole one."""
    reason = why_graph_ends(graph)
    frames = list(reason.user_stack) if reason is not None else []
    if reason is None or not frames:
        return None
    where = frames[-1].filename, frames[-1].lineno
    source = f"{where[0]}:{where[1]} in {frames[-1].name}"
    if reason.graph_break:
        text = str(reason.reason).strip().splitlines()[0]
        return GraphBreak(f"Dynamo broke the model's graph ({text}); a model must be one graph", source, where)
    resumed = next((f for f in frames if f.name.startswith(RESUME_PREFIX)), None)
    if resumed is not None:
        line = int(resumed.name.rpartition("_")[2])
        text = f"the graph is the rest of a model behind a graph break in line {line}; a model must be one graph"
        return GraphBreak(text, source, (resumed.filename, line))
    return None


def fragment(weights: int) -> GraphBreak | None:
    """The error of a graph that Dynamo made of a function inside the model; None for the model itself.

    Where Dynamo gives a frame up without a word it compiles the functions that the frame calls. While it does so, the
    frame stands on the stack, between here and the call of what the user compiled.

    Args:
        weights: how many weights the graph holds.
    """
    frame, root, caller = sys._getframe(1), None, None
    while frame is not None and not is_call(frame.f_code):
        module = receiver(frame)
        if isinstance(module, nn.Module) and not isinstance(module, fx.GraphModule):
            root = module
        if caller is None and not frame.f_code.co_filename.startswith(LIBRARIES):
            caller = frame
        frame = frame.f_back  # type: ignore[assignment]
    held = sum(1 for _ in root.parameters()) if root is not None else 0
    if frame is None or caller is None or 4 * weights >= held:
        return None
    where = caller.f_code.co_filename, caller.f_lineno
    text = (
        f"Dynamo broke the model's graph: what it compiles holds {weights} of {held} weights; a model must be one graph"
    )
    return GraphBreak(text, f"{where[0]}:{where[1]} in {caller.f_code.co_name}", where)


class GraphBreak(UnsupportedGraph):
    """A graph that is a part of a model; ``where`` is the file and line of the break, the same for both sides of it."""

    def __init__(self, reason: str, source: str, where: tuple[str, int | None]) -> None:
        super().__init__(reason, source=source)
        self.where = where

    def again(self) -> GraphBreak:
        """The same error without the traceback of where it was raised before."""
        assert self.source is not None
        return GraphBreak(self.reason, self.source, self.where)
