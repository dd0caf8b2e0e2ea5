"""Python numbers among a model's arguments: a timestep given as a float or an int must not cost a compilation a step.

Dynamo hands a float over as a 0-d float64 tensor that the graph reads with ``.item()``, and an int as a symbolic size.
Both become 0-d tensors here, so that one captured graph serves every value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from ras_compile._torch import FakeTensor, pytree, set_source, source_of
from ras_compile.capture.export import capture
from ras_compile.capture.inputs import GraphInput
from ras_compile.capture.sizes import expressions
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.analysis.emit import copied

_CAPTURED = "captured"  # in the meta of a graph


def number_positions(graph: fx.Graph, inputs: Sequence[GraphInput]) -> list[int]:
    """Positions of integers that are arguments themselves and vary, and no sizes of tensors, nor of what the graph makes."""
    numbers = {}
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        if inputs[index].size and inputs[index].argument is not None:
            numbers[index] = expressions(node.meta.get("example_value"))
    tensors = (node.meta.get("example_value") for node in graph.nodes) if numbers else ()
    sizes = {size for value in tensors if isinstance(value, torch.Tensor) for size in expressions(value)}
    symbols = {symbol for size in sizes for symbol in size.free_symbols}
    return [
        index for index, found in numbers.items() if not symbols & set(found) and not any(e.is_Integer for e in found)
    ]


def as_tensors(values: Sequence[Any], positions: Sequence[int]) -> Sequence[Any]:
    """The values with the integers at ``positions`` as 0-d tensors."""
    if not positions:
        return values
    result = list(values)
    for index in positions:
        if isinstance(result[index], int):
            result[index] = torch.tensor(result[index])
    return result


def as_sizes(graph: fx.GraphModule, positions: Collection[int]) -> fx.GraphModule:
    """A copy of a Dynamo graph that takes a tensor `[n]` in the place of each integer n, whose size a trace can follow."""
    known: dict[fx.Node, fx.Node] = {}
    new, old = copied(graph.graph, known), graph.graph.find_nodes(op="placeholder")
    examples = (node.meta.get("example_value") for node in old)
    mode = next(value.fake_mode for value in examples if isinstance(value, FakeTensor))
    first = next(node for node in new.nodes if node.op != "placeholder")
    for index, node in enumerate(old):
        place, number = known[node], node.meta.get("example_value")
        set_source(place, source_of(node) or str(node.target))
        if index in positions:
            with mode:
                place.meta["example_value"] = torch.empty(number)
            with new.inserting_before(first):
                size = new.call_method("size", (place, 0))
            size.meta["example_value"] = number
            place.replace_all_uses_with(size, {node for node in place.users if node is not size}.__contains__)
    return fx.GraphModule(graph, new)


def read_floats(graph: fx.GraphModule, dtype: torch.dtype | None) -> fx.GraphModule | None:
    """A copy of the graph in which ``.item()`` of a float argument is the 0-d tensor itself; None where there is none.

    Args:
        dtype: cast to it, as a Python number beside integers would be of the default dtype.
    """
    new = copied(graph.graph)
    numbers: set[fx.Node] = set()  # what is, or is computed in Python from, a float argument
    for node in list(new.nodes):
        operand = node.args[0] if node.args else None
        if node.op == "call_method" and node.target == "item":
            if isinstance(operand, fx.Node) and operand.op == "placeholder":
                with new.inserting_before(node):
                    value = operand if dtype is None else new.call_method("to", (operand, dtype))
                numbers.add(value)
                node.replace_all_uses_with(value)
                new.erase_node(node)
        elif node.op == "call_function" and numbers.intersection(node.all_input_nodes):
            if getattr(node.target, "__module__", None) in ("_operator", "math"):
                numbers.add(node)
            elif node.target is torch.scalar_tensor and operand in numbers:
                wanted = {name: node.kwargs[name] for name in ("dtype", "device") if node.kwargs.get(name) is not None}
                with new.inserting_before(node):
                    value = new.call_method("to", (operand,), {"dtype": torch.get_default_dtype(), **wanted})
                node.replace_all_uses_with(value)
                new.erase_node(node)
    return fx.GraphModule(graph, new) if numbers else None


def _dtypes(graph: fx.GraphModule, key: str) -> list[torch.dtype]:
    """The types of the tensors that a graph returns, as its nodes hold them under ``key``."""
    values = [
        node.meta.get(key) for node in pytree.tree_leaves(graph.graph.output_node().args) if isinstance(node, fx.Node)
    ]
    return [value.dtype for value in values if isinstance(value, torch.Tensor)]


def keep_captured(graph: fx.GraphModule, captured: fx.GraphModule) -> None:
    """Tells :func:`capture_numbers` what another process has captured of a graph; it holds no tensors."""
    captured.meta["constants"] = []
    graph.meta[_CAPTURED] = captured


def capture_numbers(
    graph: fx.GraphModule, values: Sequence[Any], *, symbolic: Callable[[Any], Any] | None = None
) -> fx.GraphModule:
    """Captures a graph whose float arguments stay variable; see :func:`capture`.

    Raises:
        UnsupportedGraph: the graph cannot be captured, or needs the value of a float argument.
    """
    known = graph.meta.pop(_CAPTURED, None) if symbolic is None else None
    if known is not None:  # once: who gets it may change it
        return known
    for dtype in (None, torch.get_default_dtype()):
        variant = read_floats(graph, dtype)
        if variant is None:
            return capture(graph, values, symbolic=symbolic)
        try:
            captured = capture(variant, values, symbolic=symbolic)
        except (UnsupportedGraph, TypeError):
            continue
        if _dtypes(captured, "val") == _dtypes(graph, "example_value"):
            return captured
    raise UnsupportedGraph("the model needs the value of a Python float argument; pass the timestep as a tensor")
