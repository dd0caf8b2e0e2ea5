"""One program from several: the same ops at several lengths of the context, with sizes that are functions of the lengths.

    view(x, [2, 29, 64])  at length 5  and  view(x, [2, 33, 64])  at length 9      become      view(x, [2, length + 24, 64])

The programs that are given are static, so that nothing that writes or checks them has to know of symbols. Every number
in which they differ must be a constant plus whole multiples of the lengths; one more program than it takes to find
these must agree.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile.passes.analysis.roles import Role

Point = tuple[int, ...]  # one value for each length


class NotAffine(Exception):
    """The programs are not one program at several lengths: says in what they differ."""


@dataclass(frozen=True)
class Affine:
    """``constant + sum(slopes * lengths)``."""

    constant: int
    slopes: Point

    def __call__(self, lengths: Sequence[Any]) -> Any:
        return sum((slope * length for slope, length in zip(self.slopes, lengths, strict=True) if slope), self.constant)


def sample_points(base: Point, steps: Sequence[int], check: Point) -> list[Point]:
    """``base``, one point for each length that is ``steps`` away from it in that length alone, and one to check with."""
    moved = [tuple(b + steps[i] * (i == k) for i, b in enumerate(base)) for k in range(len(base))]
    return [base, *moved, check]


def fit(points: Sequence[Point], values: Sequence[int]) -> Affine | None:
    """The function that has ``values`` at ``points`` (see :func:`sample_points`); None where there is none."""
    base, slopes = points[0], []
    for axis, (point, value) in enumerate(zip(points[1:-1], values[1:-1], strict=True)):
        slope, rest = divmod(value - values[0], point[axis] - base[axis])
        if rest:
            return None
        slopes.append(slope)
    found = Affine(values[0] - sum(s * b for s, b in zip(slopes, base, strict=True)), tuple(slopes))
    return found if all(found(point) == value for point, value in zip(points, values, strict=True)) else None


def interpolate(programs: Sequence[fx.GraphModule], points: Sequence[Point]) -> fx.GraphModule:
    """The program of which ``programs`` are the forms at ``points``. It takes the lengths first, then their inputs.

    Each node has the ``meta["val"]`` of the first of them, and says in ``meta["sizes"]`` how large it is in each.

    Raises:
        NotAffine: they differ in more than numbers, or in a number that is no affine function of the lengths.
    """
    return _Interpolation(programs, points).run()


class _Interpolation:
    def __init__(self, programs: Sequence[fx.GraphModule], points: Sequence[Point]) -> None:
        self.programs, self.points = programs, points
        self.graph = fx.Graph()
        self.lengths = [self.graph.placeholder(f"length_{index}") for index in range(len(points[0]))]
        self.known: list[dict[fx.Node, fx.Node]] = [{} for _ in programs]

    def run(self) -> fx.GraphModule:
        graphs = [list(program.graph.nodes) for program in self.programs]
        if any(len(nodes) != len(graphs[0]) for nodes in graphs):
            raise NotAffine(f"programs of {', '.join(str(len(nodes)) for nodes in graphs)} operations")
        for length, now in zip(self.lengths, self.points[0], strict=True):
            length.meta["val"], length.meta["role"] = now, Role.LENGTH
        for nodes in zip(*graphs, strict=True):
            self._node(nodes)
        self.graph.lint()
        return fx.GraphModule(self.programs[0], self.graph)

    def _node(self, nodes: tuple[fx.Node, ...]) -> None:
        first = nodes[0]
        if any((node.op, node.target) != (first.op, first.target) for node in nodes):
            raise NotAffine(f"{first.format_node()} stands where elsewhere there is {nodes[-1].format_node()}")
        if first.op == "get_attr":
            held = [operator.attrgetter(str(first.target))(program) for program in self.programs]
            if not all(other is held[0] or _equal(held[0], other) for other in held[1:]):
                raise NotAffine(f"the constant {first.target} depends on the lengths")
        args = self._blend(tuple(node.args for node in nodes), first)
        kwargs = self._blend(tuple(node.kwargs for node in nodes), first)
        made = self.graph.create_node(first.op, first.target, args, kwargs, name=first.name)
        made.meta = {**first.meta, "sizes": [_sizes(node.meta.get("val")) for node in nodes]}
        for known, node in zip(self.known, nodes, strict=True):
            known[node] = made

    def _blend(self, values: tuple[Any, ...], where: fx.Node) -> Any:
        """What stands in the new program where the programs have ``values``."""
        first = values[0]
        if any(type(value) is not type(first) for value in values):
            raise NotAffine(f"an argument of {where.format_node()} is of another kind elsewhere")
        if isinstance(first, fx.Node):
            made = {known[value] for known, value in zip(self.known, values, strict=True)}
            if len(made) > 1:
                raise NotAffine(f"an operand of {where.format_node()} is another value elsewhere")
            return made.pop()
        if isinstance(first, (tuple, list)):
            if any(len(value) != len(first) for value in values):
                raise NotAffine(f"an argument of {where.format_node()} has another length elsewhere")
            return type(first)([self._blend(entries, where) for entries in zip(*values, strict=True)])
        if isinstance(first, dict):
            if any(value.keys() != first.keys() for value in values):
                raise NotAffine(f"arguments of {where.format_node()} have other names elsewhere")
            return {key: self._blend(tuple(value[key] for value in values), where) for key in first}
        if all(value == first for value in values):
            return first
        found = fit(self.points, values) if type(first) is int else None
        if found is None:
            raise NotAffine(f"an argument of {where.format_node()} is {', '.join(map(str, values))} elsewhere")
        return self._spell(found)

    def _spell(self, value: Affine) -> fx.Node:
        """Nodes that compute a number, next to where it is needed: repeated blocks then hold them, and stay alike."""
        total: Any = value.constant
        for slope, length in zip(value.slopes, self.lengths, strict=True):
            if slope:
                term = length if slope == 1 else self._number(operator.mul, length, slope)
                total = term if isinstance(total, int) and total == 0 else self._number(operator.add, term, total)
        return total

    def _number(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args))
        return node


def _equal(first: Any, second: Any) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)


def _sizes(value: Any) -> Any:
    """Sizes and strides of a node's value."""
    if isinstance(value, (tuple, list)):
        return [_sizes(item) for item in value]
    return (tuple(value.shape), value.stride()) if isinstance(value, Tensor) else None
