"""Weights that are no plain tensors, taken apart where they enter a graph.

Quantised weights come in two kinds. One is made of other tensors and computes with them (torchao's `Int8Tensor`, of integers and
scales): its parts become inputs of the graph, and it is put together again where the graph uses it, so that what is captured
are the plain ops that its product is made of.

    weight -> linear(x, weight)      becomes      integers, scales -> whole -> linear(x, whole)

The other is a plain tensor with attributes and functions of its own (diffusers' `GGUFParameter`). Dynamo has already traced
through its functions, so that the graph means the plain tensor; with the weight itself they would be called once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ras_compile._torch import (
    FakeTensor,
    copy_reason,
    is_traceable_wrapper_subclass,
    keeps_dispatch,
    set_source,
    source_of,
)
from ras_compile.passes.analysis.emit import copied, origin_of


class Entrance:
    """From the inputs of Dynamo's graph to plain tensors.

    Args:
        graph: Dynamo's graph.
        inputs: what it is called with, real or fake; the same classes come at each call, as Dynamo guards them.

    Attributes:
        graph: a copy of the graph that takes plain tensors; the graph itself where it does so already.
        changes: whether inputs have to come through it; known after the first call, as fake tensors do not tell.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
        wholes = {i: _whole_of(value) for i, value in enumerate(inputs) if is_traceable_wrapper_subclass(value)}
        self._paths = {i: whole.paths() for i, whole in wholes.items()}
        self._dressed: list[int] | None = None
        self.changes = True
        self.graph = _taking_parts(graph, inputs, wholes) if wholes else graph

    def __call__(self, values: Sequence[Any]) -> Sequence[Any]:
        """The inputs of :attr:`graph` for those of Dynamo's graph."""
        if self._dressed is None:
            self._dressed = [index for index, value in enumerate(values) if _is_dressed(value)]
            self.changes = bool(self._dressed or self._paths)
        if self._dressed:
            values = list(values)
            for index in self._dressed:
                values[index] = values[index].as_subclass(Tensor)
        if not self._paths:
            return values
        plain: list[Any] = []
        for index, value in enumerate(values):
            if index in self._paths:
                plain += [_part(value, path) for path in self._paths[index]]
            else:
                plain.append(value)
        return plain


def _is_dressed(value: Any) -> bool:
    """Whether a value is a plain tensor of a class of its own."""
    if not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter) or isinstance(value, FakeTensor):
        return False
    return not is_traceable_wrapper_subclass(value) and keeps_dispatch(type(value))


@dataclass(eq=False)  # equal ones are one object: see `_taking_parts`
class _Whole:
    """Puts a tensor of a class that is made of others together from plain ones, in the order of :meth:`paths`."""

    kind: Any
    context: Any
    size: Any
    stride: Any
    parts: list[tuple[str, _Whole | None]]  # None: a plain tensor

    __name__ = "whole"  # as the code of a graph calls it

    def paths(self) -> list[tuple[str, ...]]:
        """Where the plain tensors stand: attributes of attributes."""
        return [(name, *rest) for name, inner in self.parts for rest in ([()] if inner is None else inner.paths())]

    def __call__(self, *plain: Tensor) -> Tensor:
        left = list(plain)
        inner = {}
        for name, whole in self.parts:
            count = 1 if whole is None else len(whole.paths())
            inner[name] = left[0] if whole is None else whole(*left[:count])
            left = left[count:]
        return self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)


def _whole_of(value: Any) -> _Whole:
    names, context = value.__tensor_flatten__()
    parts = [(name, getattr(value, name)) for name in names]
    inner = [(name, _whole_of(part) if is_traceable_wrapper_subclass(part) else None) for name, part in parts]
    return _Whole(type(value), context, value.shape, value.stride(), inner)


def _part(value: Any, path: Sequence[str]) -> Tensor:
    for name in path:
        value = getattr(value, name)
    return value


def _taking_parts(graph: fx.GraphModule, inputs: Sequence[Any], wholes: dict[int, _Whole]) -> fx.GraphModule:
    new = copied(graph.graph)
    interned: dict[str, _Whole] = {}
    old = graph.graph.find_nodes(op="placeholder")
    for index, node in enumerate(new.find_nodes(op="placeholder")):
        set_source(node, source_of(old[index]) or str(node.target))
        if index not in wholes:
            continue
        found = wholes[index]
        whole = interned.setdefault(repr(found), found)
        example = node.meta.get("example_value", inputs[index])
        with new.inserting_before(node):
            leaves = [new.placeholder("_".join((node.name, *path))) for path in whole.paths()]
        for leaf, path in zip(leaves, whole.paths(), strict=True):
            set_source(leaf, ".".join((source_of(node) or node.name, *path)))
            leaf.meta["example_value"] = _part(example, path)
        if node.users:
            first = next(user for user in new.nodes if user in node.users)
            with new.inserting_before(first):
                made = new.call_function(whole, tuple(leaves))
            made.meta = {**origin_of(first), "example_value": example}
            node.replace_all_uses_with(made)
        new.erase_node(node)
    new.lint()
    return copy_reason(graph, fx.GraphModule(graph, new))
