"""What each cache and each result comes from: no pass may let one come from an input that it did not come from before.

So a pass that exchanges two caches, two weights or two results of a launch is seen, though all sizes agree. Memory is followed by
its owner, and a launch of several ops member by member. The active rows and the lengths are left out: a pass may spell index
tensors in other ways.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from ras_compile._torch import auto_functionalized_v2, schema_of
from ras_compile.passes.analysis.roles import Role, role_of
from ras_compile.passes.programs.aliases import root, subgraph, writes
from ras_compile.passes.rules.registry import named_arguments, nodes_in, operands
from ras_compile.passes.spec.demand import demand

own = torch.ops.ras_compile
Sources = dict[str, frozenset[str]]


def sources_of(program: fx.GraphModule) -> Sources:
    """For each cache of a program, by its name, and for each result, by its place, the names of the inputs that it comes from."""
    inputs = program.graph.find_nodes(op="placeholder")
    counted = [node for node in inputs if role_of(node) not in (Role.ROWS, Role.LENGTH)]
    step = _Step({node: 1 << place for place, node in enumerate(counted)})
    results = step.follow(program.graph)
    found = {node.name: step.memory.get(node, 0) for node in inputs if role_of(node) is Role.CACHE}
    found |= {f"result {place}": value for place, value in enumerate(results)}
    return {
        name: frozenset(node.name for place, node in enumerate(counted) if value >> place & 1)
        for name, value in found.items()
    }


def check_sources(program: fx.GraphModule, before: Sources) -> None:
    """Everything comes from what it came from before the passes, or from less.

    Raises:
        SpecViolation: it does not.
    """
    last = program.graph.output_node()
    for name, found in sources_of(program).items():
        new = sorted(found - before.get(name, frozenset()))
        demand(not new, last, f"`{name}` now comes from {', '.join(new)}")


class _Step:
    """Follows a graph. A set of inputs is an int, with one bit for each of them.

    Args:
        given: that of each placeholder; none for those left out.
    """

    def __init__(self, given: dict[fx.Node, int]) -> None:
        self.values: dict[fx.Node, Any] = dict(given)  # a list for a node of several results
        self.memory: dict[fx.Node, int] = {}  # what has been written into a value's memory

    def follow(self, graph: fx.Graph) -> list[int]:
        """Returns the sources of the results."""
        for node in graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._call(node)
        return [self._of(result) for result in graph.output_node().args[0]]

    def _of(self, *given: Any) -> int:
        found = 0
        for node in nodes_in(given):
            value = self.values.get(node, 0)
            found |= functools.reduce(operator.or_, value, 0) if isinstance(value, list) else value
            found |= self.memory.get(root(node), 0)
        return found

    def _call(self, node: fx.Node) -> Any:
        block = subgraph(node)
        if block is not None:
            inputs = block.graph.find_nodes(op="placeholder")
            outer = dict(zip(inputs, node.args[2:], strict=True))
            inner = _Step({one: self._of(operand) for one, operand in outer.items()})
            results = inner.follow(block.graph)
            for one, value in inner.memory.items():
                if one in outer:
                    self._write(outer[one], value)
            return results
        if node.target is operator.getitem:
            origin, place = node.args
            value = self.values.get(origin, 0)
            return value[place] if isinstance(value, list) else self._of(origin)
        if node.target is auto_functionalized_v2:
            return self._functional(node)
        written = writes(node)
        several = node.target in (own.many_linears.default, own.grouped_scatter_linear.default)
        members = self._members(named_arguments(node)) if several else [self._of(*operands(node))]
        if not written:
            return members if several else members[0]
        for operand, value in zip(written, members, strict=True):
            self._write(operand, value)
        return members[0]

    def _members(self, given: dict[str, Any]) -> list[int]:
        """For each member of a launch what it is given: its place of every list, and what is no list."""
        lists = [value for value in given.values() if isinstance(value, (list, tuple)) and nodes_in(value)]
        shared = self._of(*(value for value in given.values() if isinstance(value, fx.Node)))
        return [self._of(*places) | shared for places in zip(*lists, strict=True)]

    def _functional(self, node: fx.Node) -> list[int]:
        """An op that writes, spelled without writing: a result, which is none, and what each of its bases becomes."""
        target, given = node.args[0], dict(node.kwargs)
        bases = given.pop("_all_bases")
        (name,) = (a.name for a in schema_of(target).arguments if a.alias_info is not None and a.alias_info.is_write)
        count = given.get(f"_{name}_length")
        found = [self._of(base) for base in bases]
        plain = {key: value for key, value in given.items() if not key.startswith("_")}
        members = [self._of(*plain.values())] if count is None else self._members(plain)
        for place, value in enumerate(members):
            found[given[f"_{name}_base_index" if count is None else f"_{name}_{place}_base_index"]] |= value
        return [0, *found]

    def _write(self, operand: Any, value: int) -> None:
        owner = root(operand)
        self.memory[owner] = self.memory.get(owner, 0) | value
