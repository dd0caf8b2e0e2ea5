"""One program from several: the same ops at several lengths of the context, with sizes that are functions of the lengths.

    view(x, [2, 29, 64])  at length 5  and  view(x, [2, 33, 64])  at length 9      become      view(x, [2, length + 24, 64])

The programs that are given are static, so that nothing that writes or checks them has to know of symbols. Every number
in which they differ must be a constant plus whole multiples of the lengths, or of products of them where lengths are the
sides of a picture (its tokens are height times width); one more program than it takes to find these must agree.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ras_compile.passes.analysis.roles import Role

Point = tuple[int, ...]  # one value for each length
FINEST = 1024  # of floating point numbers that are sizes divided by a power of two


class NotAffine(Exception):
    """The programs are not one program at several lengths: says in what they differ."""


@dataclass(frozen=True)
class Form:
    """A sum of whole multiples of products of lengths, or a floating point number that is such a sum by a power of two."""

    # each multiple that is not zero, and the exponents of the lengths in its product: ``(2, (1, 0))`` is twice
    # the first of two lengths, ``(5, (0, 0))`` the constant 5
    terms: tuple[tuple[int, Point], ...]
    over: int = 0  # what the sum is divided by; 0: it is a whole number

    def __call__(self, lengths: Sequence[Any]) -> Any:
        total = sum(multiple * product(lengths, exponents) for multiple, exponents in self.terms)
        return total / self.over if self.over else total

    @property
    def varies(self) -> bool:
        """Whether it depends on the lengths."""
        return any(map(any, (exponents for _, exponents in self.terms)))


def product(lengths: Sequence[Any], exponents: Point) -> Any:
    """The product of lengths, each as often as its exponent says."""
    return math.prod(length for length, times in zip(lengths, exponents, strict=True) for _ in range(times))


def sample_points(base: Point, steps: Sequence[int], check: Point, most: Point = ()) -> list[Point]:
    """``base``, then points from which the multiples of a :class:`Form` are found, then one to check with.

    Args:
        base: the present lengths.
        steps: how far the points are apart, for each length.
        check: lengths farther away than all others.
        most: how often each length is a factor of products with others; 0, or none said: of none, it only has multiples.
    """
    alone = [tuple(int(i == k) for i in range(len(base))) for k in range(len(base))]
    joint = itertools.product(*(range(times + 1) for times in most or [0] * len(base)))
    found = dict.fromkeys([(0,) * len(base), *alone, *joint])
    return [*(tuple(b + s * e for b, s, e in zip(base, steps, each, strict=True)) for each in found), check]


@functools.lru_cache
def _solved(points: tuple[Point, ...]) -> tuple[list[Point], list[list[int]], int]:
    """The exponents of the products that ``points`` tell apart, and what makes multiples of values: whole numbers, a divisor."""
    base = points[0]
    axes = [[abs(p - b) for p in axis if p != b] for b, axis in zip(base, zip(*points, strict=True), strict=True)]
    steps = [min(axis, default=1) for axis in axes]
    exponents = [tuple(abs(p - b) // s for p, b, s in zip(point, base, steps, strict=True)) for point in points]
    inverse = sympy.Matrix([[product(point, each) for each in exponents] for point in points]).inv()
    divisor = int(sympy.ilcm(1, *(entry.q for entry in inverse)))
    return exponents, [[int(entry * divisor) for entry in inverse.row(k)] for k in range(len(points))], divisor


def fit(points: Sequence[Point], values: Sequence[int] | Sequence[float]) -> Form | None:
    """The function that has ``values`` at ``points`` (see :func:`sample_points`); None where there is none."""
    if isinstance(values[0], float):
        over = max(Fraction(value).denominator if math.isfinite(value) else FINEST + 1 for value in values)
        found = fit(points, [int(value * over) for value in values]) if over <= FINEST else None
        return None if found is None else replace(found, over=over)
    exponents, rows, divisor = _solved(tuple(points[:-1]))
    terms = []
    for each, row in zip(exponents, rows, strict=True):
        multiple, rest = divmod(sum(part * value for part, value in zip(row, values[:-1], strict=True)), divisor)
        if rest:
            return None
        terms += [(multiple, each)] * bool(multiple)
    found = Form(tuple(terms))
    return found if found(points[-1]) == values[-1] else None


def interpolate(programs: Sequence[fx.GraphModule], points: Sequence[Point]) -> fx.GraphModule:
    """The program of which ``programs`` are the forms at ``points``. It takes the lengths first, then their inputs.

    Each node has the ``meta["val"]`` of the first of them, and says in ``meta["sizes"]`` how large it is in each.

    Raises:
        NotAffine: they differ in more than numbers, or in a number that is no :class:`Form` of the lengths.
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
        found = fit(self.points, values) if type(first) in (int, float) else None
        if found is None:
            raise NotAffine(f"an argument of {where.format_node()} is {', '.join(map(str, values))} elsewhere")
        return self._spell(found)

    def _spell(self, value: Form) -> fx.Node:
        """Nodes that compute a number, next to where it is needed: repeated blocks then hold them, and stay alike."""
        total: Any = 0
        for multiple, exponents in value.terms:
            factors = [length for length, times in zip(self.lengths, exponents, strict=True) for _ in range(times)]
            term: Any = multiple
            if factors:
                term = functools.reduce(lambda one, other: self._number(operator.mul, one, other), factors)
                term = term if multiple == 1 else self._number(operator.mul, term, multiple)
            total = term if isinstance(total, int) and total == 0 else self._number(operator.add, term, total)
        return self._number(operator.truediv, total, value.over) if value.over else total

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
