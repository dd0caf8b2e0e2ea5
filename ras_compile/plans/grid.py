"""The lengths at which a family is planned, from which its programs for all lengths are made.

Models halve the sides of a latent: for their patches, and to cut what they know of places about its middle. So a program's
lengths are sides divided by a *unit*, 1, 2, 4 or 8, the first one in which every size is a sum of products of lengths:

    96 x 64 by a unit of 2: lengths 48 and 32; the patches are 48 * 32, and the half of 96 is 48

A side that nothing cuts, such as a video's frames, has a unit of 1. Sides that leave another rest make another family. A *point*
of a family has its program's lengths.
"""

from __future__ import annotations

from itertools import product

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.lowering.interpolate import Form, Point, fit, sample_points
from ras_compile.plans.symbolic import SymbolicGraph

UNITS = 1, 2, 4, 8


class Grid:
    """Points at which a graph is right and whose sizes are of one form.

    Attributes:
        points: see :func:`~ras_compile.passes.lowering.interpolate.sample_points`; the first one is the present one.

    Raises:
        UnsupportedGraph: there are not enough of them.
    """

    def __init__(self, graph: SymbolicGraph, lengths: Point) -> None:
        self.graph = graph
        sides = graph.lengths.sides
        why = None  # of the first unit: the others are tried because of it
        for unit in UNITS if any(sides) else UNITS[:1]:
            cut = zip(sides, graph.cut, strict=True)
            self.units = tuple(unit if times and is_cut else 1 for times, is_cut in cut)
            self.rests = tuple(length % unit for length, unit in zip(lengths, self.units, strict=True))
            try:
                self.points = self.find_points(self.point_at(lengths))
            except UnsupportedGraph as error:
                why = why or error
                continue
            forms = self._find_forms()
            if forms is not None:
                self._forms = forms
                return
        raise why or UnsupportedGraph("a size is no sum of products of the sides of the latent")

    def lengths_at(self, point: Point) -> Point:
        """The graph's lengths at a point."""
        return tuple(unit * p + rest for unit, p, rest in zip(self.units, point, self.rests, strict=True))

    def point_at(self, lengths: Point) -> Point:
        """The point of the graph's lengths."""
        return tuple(length // unit for length, unit in zip(lengths, self.units, strict=True))

    def takes(self, lengths: Point) -> bool:
        """Whether these lengths leave the rests of this grid."""
        return self.lengths_at(self.point_at(lengths)) == lengths

    def fits(self, lengths: Point) -> bool:
        """Whether every size of the graph is at these lengths what the points say."""
        point = self.point_at(lengths)
        return self.takes(lengths) and [form(point) for form in self._forms] == self.graph.sizes_at(lengths)

    def _find_forms(self) -> list[Form] | None:
        values = zip(*(self.graph.sizes_at(self.lengths_at(point)) for point in self.points), strict=True)
        forms = [fit(self.points, each) for each in values]
        found = [form for form in forms if form is not None]
        return found if len(found) == len(forms) else None

    def find_points(self, base: Point) -> list[Point]:
        """A point, and others that the graph is right for.

        Raises:
            UnsupportedGraph: there are not enough of them.
        """
        sides, cuts = self.graph.lengths.sides, self.graph.cuts(self.lengths_at(base))

        def right(point: Point) -> bool:
            lengths = self.lengths_at(point)
            known = min(point) > 1 and self.graph.lengths.allows(lengths) and self.graph.holds(lengths)
            return known and self.graph.cuts(lengths) == cuts

        steps: list[int] = []
        for axis in range(len(base)):
            near = (tuple(b + step * (k == axis) for k, b in enumerate(base)) for step in (-1, 1, -2, 2, -3, 3))
            steps.append(next((point[axis] - base[axis] for point in near if right(point)), 0))
        reach = [abs(step) * max(1, times) for step, times in zip(steps, sides, strict=True)]
        far = product(*((b // 2, b // 2 + 1, 2 * b + 3, b + 7, b + 5, b + 3, b - 3) for b in base))
        check = next(
            (p for p in far if right(p) and all(abs(c - b) > r for c, b, r in zip(p, base, reach, strict=True))), None
        )
        if not all(steps) or check is None:
            raise UnsupportedGraph(f"the graph is right for too few lengths beside {base}")
        found = sample_points(base, steps, check, sides)
        if not all(map(right, found)):
            raise UnsupportedGraph(f"the graph is right for too few sides of the latent beside {base}")
        return found
