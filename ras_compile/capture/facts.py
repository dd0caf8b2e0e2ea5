"""Facts of a traced graph: values that it was specialised on, computed again from the inputs of another call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile._torch import fx_graph_cse
from ras_compile.passes.rules.registry import nodes_in


@dataclass
class Fact:
    """A value that a graph was specialised on."""

    value: Tensor  # the value, on the device of what was read
    source: str  # the user's source line


class Guard:
    """Computes the facts of a graph again, from the inputs of another call.

    Args:
        module: a graph of the traced inputs whose outputs are what was read, in that order.
        facts: the values that the graph was specialised on.
        constants: the graph's constants, its last inputs.
    """

    def __init__(self, module: fx.GraphModule, facts: Sequence[Fact], constants: Sequence[Tensor]) -> None:
        graph = fx_graph_cse(module.graph)
        self.module, self.constants = fx.GraphModule(module, graph), list(constants)
        self.facts: dict[str, Fact] = {}
        for node, fact in zip(nodes_in(graph.output_node().args), facts, strict=True):
            self.facts.setdefault(node.name, fact)
        self.inputs = self.module.graph.find_nodes(op="placeholder")
        self.reads = [
            index for index, node in enumerate(self.inputs[: len(self.inputs) - len(constants)]) if node.users
        ]

    def facts_depending_on(self, index: int) -> list[Fact]:
        """The facts that depend on an input."""
        reached = {self.inputs[index]}
        for node in self.module.graph.nodes:
            if any(operand in reached for operand in node.all_input_nodes):
                reached.add(node)
        names = {node.name for node in reached}
        return [fact for name, fact in self.facts.items() if name in names]

    def holds(self, values: Sequence[Tensor]) -> bool:
        """Whether the inputs of a call give the same facts; stops at the first that differs, since the rest hangs on it."""
        check = _Check(self.module, self.facts)
        with torch.no_grad():
            try:
                check.run(*values, *self.constants)
            except _Differs:
                return False
        return True


class _Differs(Exception):
    """A fact is another one."""


class _Check(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, facts: dict[str, Fact]) -> None:
        super().__init__(module)
        self.facts = facts

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        fact = self.facts.get(n.name)
        if fact is not None and not (value.shape == fact.value.shape and torch.equal(value, fact.value)):
            raise _Differs
        return value
