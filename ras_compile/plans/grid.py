"""The lengths at which a family is planned, from which its programs for all lengths are made.

Models halve the sides of a latent: for their patches, and to cut what they know of places about its middle. So a program's
lengths are sides divided by a *unit*, 1, 2, 4 and so on, the first one in which every size is a sum of products of lengths:

    96 x 64 by a unit of 2: lengths 48 and 32; the patches are 48 * 32, and the half of 96 is 48

A side that nothing cuts, such as a video's frames, has a unit of 1. Sides that leave another rest make another family, and so do
wide pictures beside tall ones where a model takes the larger side. A *point* of a family has its program's lengths.
"""

from __future__ import annotations

from itertools import product

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.lowering.interpolate import Point, fit, sample_points
from ras_compile.plans.symbolic import SymbolicGraph

UNITS = 1, 2, 4, 8, 16, 32  # sides that are told in pixels are cut by what a latent pixel is


class Grid:
    """Points at which a graph is right and whose sizes are of one form.

    Attributes:
        points: see :func:`~ras_compile.passes.lowering.interpolate.sample_points`; the first one is the present one.

    Raises:
        UnsupportedGraph: there are not enough of them.
    """

    def __init__(self, graph: SymbolicGraph, lengths: Point) -> None:
        self.graph = graph
        self._largest = [min(places) for places in graph.largest(lengths)]
        sides = graph.lengths.sides
        why: UnsupportedGraph | None = None
        for unit in UNITS if any(sides) else UNITS[:1]:
            cut = zip(sides, graph.cut, strict=True)
            self.units = tuple(unit if times and is_cut else 1 for times, is_cut in cut)
            self.rests = tuple(length % unit for length, unit in zip(lengths, self.units, strict=True))
            try:
                self.points = self.find_points(self.point_at(lengths))
            except UnsupportedGraph as error:
                why = why or error
                continue
            values = zip(*(self.graph.sizes_at(self.lengths_at(point)) for point in self.points), strict=True)
            forms = [fit(self.points, each) for each in values]
            self._forms = [form for form in forms if form is not None]
            if len(self._forms) == len(forms):
                return
            size = graph.spelled(graph.sizes[forms.index(None)])
            why = UnsupportedGraph(f"a number in the model is {size}, no sum of products of lengths")
        assert why is not None
        raise why

    def lengths_at(self, point: Point) -> Point:
        """The graph's lengths at a point."""
        return tuple(unit * p + rest for unit, p, rest in zip(self.units, point, self.rests, strict=True))

    def point_at(self, lengths: Point) -> Point:
        """The point of the graph's lengths."""
        return tuple(length // unit for length, unit in zip(lengths, self.units, strict=True))

    def takes(self, lengths: Point) -> bool:
        """Whether these lengths leave the rests of this grid, and the larger ones of them are those that are so here."""
        if self.lengths_at(self.point_at(lengths)) != lengths:
            return False
        return all(place in found for place, found in zip(self._largest, self.graph.largest(lengths), strict=True))

    def fits(self, lengths: Point) -> bool:
        """Whether every size of the graph is at these lengths what the points say."""
        point = self.point_at(lengths)
        return self.takes(lengths) and [form(point) for form in self._forms] == self.graph.sizes_at(lengths)

    def find_points(self, base: Point) -> list[Point]:
        """A point, and others that the graph is right for.

        Raises:
            UnsupportedGraph: there are not enough of them.
        """
        sides, cuts = self.graph.lengths.sides, self.graph.cuts(self.lengths_at(base))

        def right(point: Point) -> bool:
            lengths = self.lengths_at(point)
            known = min(point) > 1 and self.graph.lengths.allows(lengths) and self.graph.holds(lengths)
            return known and self.takes(lengths) and self.graph.cuts(lengths) == cuts

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
            raise UnsupportedGraph(f"too few lengths near {self.lengths_at(base)} are computed in the same way")
        found = sample_points(base, steps, check, sides)
        if not all(map(right, found)):
            raise UnsupportedGraph(f"too few sides near {self.lengths_at(base)} are computed in the same way")
        return found
