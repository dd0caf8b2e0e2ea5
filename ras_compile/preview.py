"""A call that is looked at and not run: its graph, its plan, and of a pipeline the first call of a transformer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from ras_compile._torch import call_uncompiled, compiled_call, original, pytree, set_compiled_call
from ras_compile.capture.inputs import GraphInput, describe_arguments, describe_inputs
from ras_compile.capture.sharding import settle_sharding_hooks
from ras_compile.capture.subclasses import Entrance
from ras_compile.capture.unusable import translate_dynamo_errors
from ras_compile.config import RASConfig
from ras_compile.dispatch.dispatcher import worth_tracing
from ras_compile.dispatch.kinds import GraphBreak, arguments_of, graph_break, part_of
from ras_compile.dispatch.traced import inputs_of, lifted, specialise
from ras_compile.errors import ConfigError, UnsupportedGraph
from ras_compile.execute.compiling import compiling
from ras_compile.plans.plan import Plan


class _Recorded(Exception):
    """Leaves the model's forward once its graph has been seen."""


def record_call(transformer: nn.Module, inputs: dict[str, Any]) -> tuple[fx.GraphModule, list[GraphInput], list[Any]]:
    """The graph that Dynamo makes of ``transformer(**inputs)``, the description of its inputs, and these. Nothing is run.

    Raises:
        UnsupportedGraph: Dynamo breaks the graph, or finds nothing to compile.
        UnusableInput: the model itself fails on these inputs.
    """
    graphs: list[fx.GraphModule] = []
    held: list[Any] = []
    names: list[GraphInput] = []
    parts: list[GraphBreak | None] = []

    def record(graph: fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        described = describe_inputs(graph.graph)
        broken = graph_break(graph) or part_of(described, example_inputs, RASConfig())

        def leave(*values: Any) -> Any:
            named = arguments_of(broken, described, values, type(module).forward, (), inputs) if broken else described
            graphs.append(graph)
            held.extend(values)
            names.extend(named or ())
            parts.append(broken if named is None else None)
            raise _Recorded

        return leave

    module = original(transformer)
    settle_sharding_hooks(module)

    def call(**kwargs: Any) -> Any:
        # with its hooks, past what it was compiled to, which other threads may call now
        return call_uncompiled(module, **kwargs)

    # Dynamo keeps what it compiled with the code object: one of our own leaves the module's alone, and never fills up
    fresh = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
    try:
        with torch.no_grad(), translate_dynamo_errors((), inputs):
            torch.compile(fresh, backend=record, dynamic=False)(**inputs)
    except _Recorded:
        pass
    if not graphs:
        raise UnsupportedGraph("Dynamo finds nothing to compile in this call")
    if parts[0] is not None:
        raise parts[0]
    entrance = Entrance(graphs[0], held)
    described = names if entrance.graph is graphs[0] else describe_inputs(entrance.graph.graph)
    return entrance.graph, described, list(entrance(held))


def named(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all of them by name.

    Raises:
        TypeError: it takes others.
    """
    given = inspect.signature(call).bind(*args, **kwargs)
    named = dict(given.arguments)
    for name, parameter in given.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


def first_call(pipe: Any, transformers: dict[str, nn.Module], inputs: dict[str, Any]) -> tuple[nn.Module, dict]:
    """The transformer that a call of a pipeline calls first, with that call's arguments by name; there the call ends.

    Raises:
        ConfigError: it calls none of them.
    """
    calls: list[tuple[nn.Module, dict[str, Any]]] = []

    def noting(module: nn.Module) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            calls.append((module, named(module.forward, args, kwargs)))
            raise _Recorded

        return note

    before = {name: compiled_call(original(module)) for name, module in transformers.items()}
    for module in transformers.values():
        set_compiled_call(original(module), noting(original(module)))
    try:
        pipe(**inputs)
    except _Recorded:
        pass
    finally:
        for name, module in transformers.items():
            set_compiled_call(original(module), before[name])
    if not calls:
        raise ConfigError(
            f"this call of {type(pipe).__name__} calls none of its transformers, so there is nothing to explain."
        )
    return calls[0]


def plan_of(transformer: nn.Module, inputs: dict[str, Any], config: RASConfig) -> tuple[Plan, list, list]:
    """The plan of ``transformer(**inputs)``, the description of its inputs, and the inputs.

    Raises:
        UnsupportedGraph: there is none.
    """
    try:
        graph, described, values = record_call(transformer, inputs)
        with compiling():
            return Plan(graph, described, values, config), described, values
    except UnsupportedGraph as error:
        leaves = pytree.tree_leaves(((), inputs))
        if not worth_tracing(error, leaves):
            raise
    with compiling(announced=False):  # the model's own code runs
        root = original(transformer)
        leaves = lifted(leaves, describe_arguments(type(root).forward, (), inputs), config)
        entry = specialise(root, (), inputs, leaves, config)
    return entry.plan, list(entry.inputs), inputs_of(entry.trace, leaves)
