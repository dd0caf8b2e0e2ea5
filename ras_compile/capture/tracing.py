"""Tracing without Dynamo: the graph of a model whose Python code reads values of tensors.

Dynamo breaks the graph where Python needs a value: the length of a prompt from its mask (`mask.sum(1).tolist()`), a test
(`if torch.all(image == 0)`), a boolean index (`text[mask]`). Such a model is run once as it is, with every such reading
noted, and then traced with the readings played back. What was read are the *facts* of the graph: tensors that must have
the same values at a later call, or the graph is not the graph of that call.

    mask -> sum -> tolist -> [5, 7] -> text[0, :5] ...      becomes      text -> slice(0, 5) ...     fact: sum(mask) == [5, 7]
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile._torch import (
    OpOverload,
    OptimizedModule,
    call_uncompiled,
    compiled_call,
    original,
    pytree,
    set_compiled_call,
    tables_of,
)
from ras_compile.capture.export import export
from ras_compile.capture.facts import Fact, Guard
from ras_compile.capture.python_state import PythonState
from ras_compile.capture.readings import Closed, Noted, Replayed, plain_readings
from ras_compile.capture.token_wise import Opaque
from ras_compile.capture.unusable import unusable
from ras_compile.errors import UnsupportedGraph, first_line
from ras_compile.passes.analysis.emit import copied


@dataclass
class Trace:
    """What tracing gives."""

    # the captured graph: functional ATen; inputs are the arguments' tensors, then the closed tensors
    graph: fx.GraphModule
    closed: list[Closed]  # the tensors that are no arguments, in the order of their placeholders
    guard: Guard  # tells whether the graph is that of another call, too
    output_spec: pytree.TreeSpec  # structure of what the model returns
    others: list[Any]  # the leaves of what it returns; ``None`` where a tensor stands
    is_tensor: list[bool]  # which of those leaves are tensors


def trace(root: nn.Module, args: tuple, kwargs: dict, *, runs: bool = False) -> Trace:
    """Traces one call of a model. The model runs twice as it is: the first time it may build tables that it keeps.

    Args:
        runs: index tensors whose places follow one another are read, too, and become slices.

    Raises:
        UnsupportedGraph: it cannot be traced.
        UnusableInput: the model itself fails on these inputs.
    """
    with parts_uncompiled(root):
        return _trace(root, args, kwargs, runs)


@contextmanager
def parts_uncompiled(root: nn.Module) -> Iterator[None]:
    """While it is open, parts of a model that were compiled by themselves (regional compilation) run as they are.

    The whole model is compiled in their place, and what a tracer runs must be the model's own code.
    """
    called = [(part, compiled_call(part)) for part in root.modules() if part is not root and compiled_call(part)]
    wrapped = [(part, part.forward) for part in root.modules() if isinstance(part, OptimizedModule)]
    try:
        for part, _ in called:
            set_compiled_call(part, None)
        for wrapper, _ in wrapped:
            wrapper.forward = original(wrapper).__call__  # a method: a module would become a child of the wrapper
        yield
    finally:
        for part, call in called:
            set_compiled_call(part, call)
        for wrapper, forward in wrapped:
            wrapper.forward = forward


def _trace(root: nn.Module, args: tuple, kwargs: dict, runs: bool) -> Trace:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    with torch.no_grad():
        try:
            call_uncompiled(root, *args, **kwargs)
        except Exception as error:
            raise unusable(first_line(error), args, kwargs) from error
        state, opaque = PythonState(root), Opaque(root)
        try:
            with opaque.calls(), Noted(given, weights_of(root), runs) as noted:
                call_uncompiled(root, *args, **kwargs)
        except UnsupportedGraph:
            raise
        except Exception as error:  # it has just run: what fails now is watching it
            raise cannot_be_traced(error) from error
    if not state.holds():
        raise UnsupportedGraph("the model changes itself each time it runs (an attribute of a module gets a new value)")
    bound = _Bound(root, leaves, spec, noted, opaque)
    closed = [*noted.closed.values(), *map(Closed, bound.constants)]
    state = PythonState(root)
    owners: list[Any] = [owner for module in root.modules() for owner in tables_of(module)]
    weights = [(owner, dict(owner)) for owner in owners]
    try:
        tensors = [*given, *(entry.tensor for entry in closed)]
        captured = export(bound, tensors, [*["an argument"] * len(given), *(entry.name for entry in closed)])
    except UnsupportedGraph:
        raise
    except Exception as error:
        raise cannot_be_traced(error) from error
    finally:
        state.restore()  # tables that were made anew are the tracer's tensors, and so are buffers that were written
        for owner, known in weights:
            if [*map(id, owner.values())] != [*map(id, known.values())]:
                owner.clear()
                owner.update(known)
    constants, count = captured.meta["constants"], sum(bound.is_tensor)
    main = fx.GraphModule(captured, outputs_of(captured.graph, slice(0, count)))
    main.meta["constants"] = constants
    guard = fx.GraphModule(captured, outputs_of(captured.graph, slice(count, None)))
    guarded = Guard(guard, bound.facts, constants)
    return Trace(main, closed, guarded, bound.output_spec, bound.others, bound.is_tensor)


def weights_of(root: nn.Module) -> dict[int, Closed]:
    """Where the parameters and buffers of a model are held, by their identity."""
    return {
        id(tensor): Closed(tensor, owner, name)
        for module in root.modules()
        for owner in tables_of(module)
        for name, tensor in owner.items()
        if tensor is not None
    }


def outputs_of(graph: fx.Graph, part: slice) -> fx.Graph:
    """A copy of a graph with a part of its outputs; every input stays."""
    new = copied(graph, results=part)
    new.eliminate_dead_code(is_impure_node=_has_effects)
    return new


def _has_effects(node: fx.Node) -> bool:
    """Whether a node of a captured graph does something beside what it returns: a border of an autocast region does.

    FX itself also takes for such a node what may draw random numbers, attention with dropout among them: it would leave a
    model's attention, and so most of the model, to be computed for each fact about a mask.
    """
    value = isinstance(node.target, OpOverload) or node.target is operator.getitem
    return node.op in ("placeholder", "output") or (node.op == "call_function" and not value)


class _Bound(nn.Module):
    """The model as a function of tensors alone, for the tracer; returns its output's tensors, then the facts'."""

    def __init__(
        self, root: nn.Module, leaves: list, spec: pytree.TreeSpec, noted: Noted, opaque: Opaque
    ) -> None:  # fmt: skip
        super().__init__()
        self.opaque = opaque
        self.call = lambda args, kwargs: call_uncompiled(root, *args, **kwargs)
        self.leaves, self.spec, self.noted = leaves, spec, noted
        self.constants = [v for r in noted.readings for v in pytree.tree_leaves(r.result) if isinstance(v, Tensor)]
        self.facts: list[Fact] = []
        self.others: list[Any] = []
        self.is_tensor: list[bool] = []

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(value, Tensor) else value for value in self.leaves]
        inputs = {key: next(given) for key in self.noted.closed}
        constants = {id(value): next(given) for value in self.constants}
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with (
            self.opaque.calls(),
            plain_readings(),
            Replayed(self.noted.readings, inputs, constants, self.noted.runs) as replayed,
        ):
            result = self.call(args, kwargs)
        if next(replayed.readings, None) is not None:
            raise UnsupportedGraph("the model reads other values each time it runs")
        flat, self.output_spec = pytree.tree_flatten(result)
        self.facts = replayed.found
        self.is_tensor = [isinstance(value, Tensor) for value in flat]
        self.others = [None if isinstance(value, Tensor) else value for value in flat]
        return (*[value for value in flat if isinstance(value, Tensor)], *replayed.facts)


def cannot_be_traced(error: Exception) -> UnsupportedGraph:
    return UnsupportedGraph(f"the model cannot be traced ({type(error).__name__}: {first_line(error)})")
