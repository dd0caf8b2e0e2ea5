"""Numbers that a module or its code holds (`eps`, a default of a function): with `torch.compile(..., dynamic=True)` they arrive as
inputs, and are constants here.

Dynamo hands such a float over as a 0-d tensor that the graph reads with ``.item()``, as it does with a float that the user
passes. The user's change from step to step; these do not, and ops take some of them as numbers alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile._torch import copy_reason, set_source, source_of
from ras_compile.passes.analysis.emit import copied

_WEIGHTS = re.compile(r"L\['[^']*'\]\._(modules|parameters)\[")


def attribute_positions(graph: fx.Graph) -> list[int]:
    """Places of the inputs that are floats of a module or of global code, and that the graph only reads as numbers."""
    places = graph.find_nodes(op="placeholder")
    # a forward may call its module by another name than `self`: it is what has modules or weights
    owners = {source.partition("]")[0] + "]" for source in map(source_of, places) if source and _WEIGHTS.match(source)}
    return [place for place, node in enumerate(places) if _is_attribute(node, ("L['self']", "G[", *owners))]


def _is_attribute(node: fx.Node, held: tuple[str, ...]) -> bool:
    value, source = node.meta.get("example_value"), source_of(node) or ""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.ndim or value.dtype != torch.float64:
        return False
    if not source.startswith(held) or "_buffers" in source or "_parameters" in source:
        return False
    return all(user.op == "call_method" and user.target == "item" for user in node.users)


class PerAttributes:
    """A graph with float attributes of modules among its inputs: one graph without them for each set of values.

    Args:
        places: where the attributes stand among its inputs.
        make: what is made of a graph and its inputs.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        places: Sequence[int],
        inputs: Sequence[Any],
        make: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    ) -> None:
        self._graph, self._places, self._inputs, self._make = graph, list(places), inputs, make
        self._made: dict[tuple[float, ...], Callable[..., Any]] = {}

    def __call__(self, *values: Any) -> Any:
        numbers = tuple([float(values[place]) for place in self._places])
        if numbers not in self._made:
            self._made[numbers] = self._make(self._with(numbers), self._left(self._inputs))
        return self._made[numbers](*self._left(values))

    def _left(self, values: Sequence[Any]) -> list[Any]:
        return [value for place, value in enumerate(values) if place not in self._places]

    def _with(self, numbers: Sequence[float]) -> fx.GraphModule:
        known: dict[fx.Node, fx.Node] = {}
        new = copied(self._graph.graph, known)
        old = self._graph.graph.find_nodes(op="placeholder")
        attributes = dict(zip([old[place] for place in self._places], numbers, strict=True))
        for node in old:
            if node not in attributes:
                set_source(known[node], source_of(node) or str(node.target))
                continue
            for reading in list(known[node].users):
                for user in list(reading.users):
                    _put(user, reading, attributes[node])
                new.erase_node(reading)
            new.erase_node(known[node])
        new.lint()
        return copy_reason(self._graph, fx.GraphModule(self._graph, new))


def _put(user: fx.Node, node: fx.Node, number: float) -> None:
    """Lets a node take a number in place of another node."""
    user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda given: number if given is node else given)
