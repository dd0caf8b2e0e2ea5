"""The backend itself: `torch.compile(transformer, backend="ras", options={...})`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ras_compile._torch import at_recompile_limit, at_reset, original, raise_recompile_limit
from ras_compile.canaries import check as check_pytorch
from ras_compile.capture.attributes import PerAttributes, attribute_positions
from ras_compile.capture.inputs import check_timestep, describe_inputs, find_timestep, vary_time_and_sides
from ras_compile.capture.numbers import as_tensors, capture_numbers, number_positions
from ras_compile.capture.sizes import strided_latents
from ras_compile.capture.subclasses import Entrance
from ras_compile.config import RASConfig
from ras_compile.dispatch import kinds
from ras_compile.dispatch.callers import compiled_call
from ras_compile.dispatch.dispatcher import (
    Dispatcher,
    Entry,
    Refusal,
    entries_at,
    key_of,
    packed,
    without_traceback,
    worth_tracing,
)
from ras_compile.dispatch.fixed import Fixed
from ras_compile.dispatch.kept import remember
from ras_compile.dispatch.kinds import (
    GraphBreak,
    Kind,
    arguments_of,
    gradients_recorded,
    graph_break,
    kind_of_graph,
    part_of,
    records_gradients,
)
from ras_compile.dispatch.traced import captured_in_this_call, here, retry_by_tracing
from ras_compile.errors import ConfigError, RASError, SpecViolation, UnsupportedGraph
from ras_compile.execute.compiling import compiling
from ras_compile.execute.inner import Compiled, compile_or_run, start_workers
from ras_compile.notices import warn_once
from ras_compile.plans.equal import first_of_its_kind, forget, known
from ras_compile.plans.family import Families
from ras_compile.plans.lengths import tell_held_size
from ras_compile.plans.plan import Plan
from ras_compile.sampling.blocks import feeds_a_block
from ras_compile.sampling.locate import note_reached

# 40 of diffusers' transformer classes share one code object, each with its options and batch sizes: 8 is soon used up.
_RECOMPILE_LIMIT = 64


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
        if not isinstance(options, Mapping | None):
            raise ConfigError(
                f"torch.compile takes options as a dict, not {type(options).__name__}: options={{'sample_ratio': 0.5}}."
            )
        config = RASConfig.from_options({**(options or {}), **({"mode": mode} if mode else {})})
        check_pytorch()
    except RASError as error:
        return _raising(error)
    part = graph_break(graph)
    if part is None or part.to_the_end:
        vary_time_and_sides(graph.graph, config.timestep)
    start_workers(example_inputs, config)
    return compiled_graph(graph, example_inputs, config)


def compiled_graph(graph: fx.GraphModule, example_inputs: Sequence[Any], config: RASConfig) -> Callable[..., Any]:
    """What runs in the place of a graph of Dynamo's."""

    def make(graph: fx.GraphModule, inputs: Sequence[Any]) -> CompiledGraph:
        return CompiledGraph(graph, inputs, config)

    places = attribute_positions(graph.graph)
    return PerAttributes(graph, places, example_inputs, make) if places else make(graph, example_inputs)


def _warn_of_limit(name: str, value: int, function: str) -> None:
    warn_once(
        f"ras_compile: Dynamo has compiled {function} so often that it gave up, at torch._dynamo.config.{name} = {value}: from "
        "now on the model runs uncompiled where it would have to be compiled anew. Raise that limit before the first call; "
        "TORCH_LOGS=recompiles says why it is compiled so often."
    )


at_reset(ras, forget)
at_recompile_limit(ras, _warn_of_limit)
# here, since Dynamo asks its limit before it calls a backend that it has found by name
raise_recompile_limit(_RECOMPILE_LIMIT)


def _raising(error: RASError) -> Callable[..., Any]:
    def fail(*values: Any) -> Any:
        raise error

    return fail


class CompiledGraph(Dispatcher[Entry]):
    """What Dynamo calls in place of a graph: finds out what the call is, and runs what its kind wants.

    Args:
        graph: the Dynamo graph; its sizes may be symbolic.

    Attributes:
        kind: what the graph is, by :data:`~ras_compile.dispatch.kinds.KINDS`; None before the first call that tells.
        broken: the error of a part of a model; None for a graph that may be a whole one.
    """

    def __init__(self, graph: fx.GraphModule, examples: Sequence[Any], config: RASConfig) -> None:
        super().__init__(config)
        described = describe_inputs(graph.graph)
        self.broken: GraphBreak | None = graph_break(graph) or part_of(described, examples, config)
        held = [
            given.weight and isinstance(value, torch.Tensor) for given, value in zip(described, examples, strict=True)
        ]
        self.weights_of = entries_at(
            [index for index, weight in enumerate(held) if weight]
        )  # a mesh of processes is none
        self.entrance = Entrance(graph, examples)
        self.graph = graph = self.entrance.graph
        self.inputs = describe_inputs(graph.graph)
        # a size that nothing reads, such as a view's offset in `timesteps`, tells neither programs nor branches apart
        unread = {index for index, node in enumerate(graph.graph.find_nodes(op="placeholder")) if not node.users}
        sizes = {index for index, given in enumerate(self.inputs) if given.size}
        self.users = [i for i, given in enumerate(self.inputs) if not given.weight and i not in sizes & unread]
        self.users_of = entries_at(self.users)
        self.numbers = number_positions(graph.graph, self.inputs)
        self.strided = strided_latents(graph.graph)  # plans take them packed, as what a scheduler makes of them is
        self.kind: Kind | None = None
        self.fixed: Fixed | None = None
        self.dense: dict[tuple, Compiled] = {}  # the graph compiled as it is, by the key of the call
        self._families = Families(graph, self.inputs, self.users)

    def __call__(self, *held: Any) -> Sequence[Any]:
        values = self.entrance(held) if self.entrance.changes else held
        plain = not (torch.is_grad_enabled() or here.falling_back or here.capturing)
        kind = self.kind if plain and self.kind is not None else self._kind(values)
        if kind is not kinds.WHOLE:
            return self._run_another(kind, values, held)
        given = self._given(values) if self.numbers or self.strided else values
        key = key_of(self.users_of(given))
        if self.fixed is not None:
            key = (*key, self.fixed.token(values))
        known = self.plans.get(key)
        if known is None:
            return self._first(values, held)
        return self.run(known[0], given, values, self.weights_of(held))

    def _kind(self, values: Sequence[Any]) -> Kind:
        """What the call is, by the table's order."""
        if records_gradients(values):
            return kinds.RECORDING
        if here.falling_back:
            return kinds.REFUSED
        if captured_in_this_call():
            return kinds.CAPTURED
        if self.kind is None:
            if self.broken is not None:
                self._name_arguments(self.broken, values)
            kind, error = kind_of_graph(self.broken, self.inputs, values, self.config)
            if error is not None and kind is not kinds.PART:  # a part may be traced
                self.refuse(error)
            self.kind = kind
        return self.kind

    def _name_arguments(self, broken: GraphBreak, values: Sequence[Any]) -> None:
        """Takes a graph behind a break for a whole one if it is: its inputs are the model's arguments."""
        call = compiled_call()
        if call is not None:
            owner, args, kwargs = call
            named = arguments_of(broken, self.inputs, values, type(original(owner)).forward, args, kwargs)
            if named is not None:
                self.inputs, self.broken = named, None

    def _run_another(self, kind: Kind, values: Sequence[Any], held: Sequence[Any]) -> Sequence[Any]:
        """Runs what is not the whole model; see the rows of the table."""
        note_reached()
        if kind is kinds.RECORDING:
            error = gradients_recorded()
            self.refuse(error)
            weights = self.weights_of(held)
            if weights and not here.falling_back:
                self.tell_dense(weights, Refusal(error, self._timestep(values)), values)
        if kind in (kinds.RECORDING, kinds.CAPTURED):
            return self.graph(*values)
        if kind is kinds.PART:
            traced = retry_by_tracing(self.config)
            if traced:
                return self.graph(*values)
            if traced is None and self.broken is not None:
                # it is kept, and so never raised: its traceback would keep the frames of the call, and with them the model
                self.refuse(self.broken.again())
        elif kind is kinds.BLOCK:
            feeds_a_block(self.users_of(values))
        return self._run_dense(values)

    def _first(self, values: Sequence[Any], held: Sequence[Any]) -> Sequence[Any]:
        """A call of the whole model without a plan: makes one, or traces the model instead, or runs it dense."""
        note_reached()
        if self.fixed is None and (fixed := Fixed(self.inputs, values)).places:
            self.fixed = fixed
        key = self._key(values, values)
        refusal = self.refused.get(key)
        if refusal is None:
            try:
                with compiling():
                    entry, given = self._make(values)
            except (UnsupportedGraph, SpecViolation) as error:
                refusal = Refusal(without_traceback(error), self._timestep(values))
            else:
                return self.run(entry, given, values, self.weights_of(held))
        why, warned, traced = refusal.error, key in self.refused, None
        if isinstance(why, UnsupportedGraph) and worth_tracing(why, values):
            traced = retry_by_tracing(self.config)
            if traced:
                return self.graph(*values)
        if traced is None and not (warned and self.config.unsupported == "dense"):
            self.refuse(why)  # else the traced model has told its refusal
        self.refused[key] = refusal
        outputs = self._run_dense(values)
        self.tell_dense(self.weights_of(held), refusal, values)
        return outputs

    def _key(self, given: Sequence[Any], values: Sequence[Any]) -> tuple:
        key = key_of(self.users_of(given))
        return key if self.fixed is None else (*key, self.fixed.token(values))

    def _timestep(self, values: Sequence[Any]) -> int | None:
        return find_timestep(self.inputs, values, self.config.timestep)

    def _given(self, values: Sequence[Any]) -> Sequence[Any]:
        """The values as plans take them."""
        given = list(as_tensors(values, self.numbers))
        for index in self.strided:
            given[index] = packed(given[index])
        return given

    def _make(self, values: Sequence[Any]) -> tuple[Entry, Sequence[Any]]:
        """Makes the entry of a call: with integers as numbers and views packed first, and as they are if there is no such plan.

        Raises:
            UnsupportedGraph: there is no plan.
            ConfigError: the option `timestep` names no argument.
        """
        given = self._given(values)
        key = self._key(given, values)
        if key in self.plans:  # another thread has made it
            return self.plans[key][0], given
        self._check_timestep(values)
        try:
            entry = Entry(self._plan(given, self.config), self.inputs, values, self.users, self.config)
        except (UnsupportedGraph, SpecViolation, TypeError):
            if not self.numbers and not self.strided:
                raise
            self.numbers, self.strided = [], []
            return self._make(values)
        self.keep(key, entry)
        if not self.numbers and not any(described.size for described in self.inputs):
            remember()
        return entry, given

    def _check_timestep(self, values: Sequence[Any]) -> None:
        """Refuses a name that neither the graph knows nor the model, of which a graph has the arguments alone that it reads."""
        if self.config.timestep is not None and self._timestep(values) is None:
            call = compiled_call()
            if call is not None:
                check_timestep(self.config.timestep, type(original(call[0])))

    def _plan(self, values: Sequence[Any], config: RASConfig) -> Plan:
        """The plan for a call, one that it shares with an equal graph or with other lengths of the context if it can."""
        fixed = None if self.fixed is None else self.fixed.token(values)
        plan = self._families.plan(values, config, self.numbers, fixed, new=False)
        if plan is None:
            found = known(lambda: capture_numbers(self.graph, values), self.inputs, values, config)
            if found is not None:
                return found
            tell_held_size(self.graph.graph, self.inputs)
            plan = self._families.plan(values, config, self.numbers, fixed)
        return first_of_its_kind(
            Plan(self.graph, self.inputs, values, config) if plan is None else plan, self.inputs, values, config
        )

    def plan_for(self, entry: Entry, values: Sequence[Any], config: RASConfig) -> Plan:
        return self._plan(values, config)

    def _run_dense(self, values: Sequence[Any]) -> Sequence[Any]:
        """The graph as it is, through the inner compiler where its sizes are static."""
        if any(given.size for given in self.inputs):
            return self.graph(*values)
        key = key_of(self.users_of(values))
        if key not in self.dense:
            with compiling():
                if key not in self.dense:
                    self.dense[key] = compile_or_run(lambda: self.graph, values, self.config)
        return self.dense[key](*values)
