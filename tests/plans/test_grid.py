"""Points of a family: near ones, one far away, and units in which the sides of a latent are counted."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ras_compile.errors import UnsupportedGraph
from ras_compile.plans.grid import Grid


def graph(
    axes: int,
    allows: Callable = lambda point: True,
    holds: Callable = lambda point: True,
    sides: tuple = (),
    sizes_at: Callable = lambda point: [],
    cuts: Callable = lambda point: [],
    cut: tuple = (),
    largest: Callable = lambda point: [],
) -> Any:
    """Stands for a graph of so many lengths."""
    lengths = SimpleNamespace(allows=allows, sides=sides or (0,) * axes)
    return SimpleNamespace(
        lengths=lengths, holds=holds, sizes_at=sizes_at, cuts=cuts, cut=cut or (True,) * axes, largest=largest,
        sizes=["height", "height"], spelled=str,
    )  # fmt: skip


POINTS = {  # the present lengths, those that are allowed, those at which the graph holds, and the points
    "any": ((8,), lambda p: True, lambda p: True, [(8,), (7,), (4,)]),
    "even": ((8,), lambda p: p[0] % 2 == 0, lambda p: True, [(8,), (6,), (4,)]),
    "not below": ((8,), lambda p: p[0] >= 8, lambda p: True, [(8,), (9,), (19,)]),
    "each third, not below": ((9,), lambda p: p[0] >= 9, lambda p: p[0] % 3 == 0, [(9,), (12,), (21,)]),
    "each third": ((6,), lambda p: p[0] % 3 == 0, lambda p: True, [(6,), (3,), (15,)]),
    "two, each third": ((6, 6), lambda p: p[0] % 3 == 0, lambda p: p[1] % 3 == 0, [(6, 6), (3, 6), (6, 3), (15, 15)]),
    "two": ((8, 5), lambda p: True, lambda p: p[1] > 4, [(8, 5), (7, 5), (8, 6), (4, 13)]),
}


@pytest.mark.parametrize("name", POINTS)
def test_points_are_near_ones_and_one_far_away(name):
    """A step along each length alone, as small as it can be, and a check that lies beyond the step of every length."""
    base, allows, holds, points = POINTS[name]
    assert Grid(graph(len(base), allows, holds), base).points == points


@pytest.mark.parametrize("lengths", [[5], [5, 6], [4, 5, 6], [5, 13]])
def test_a_graph_that_is_right_for_too_few_lengths_has_no_family(lengths):
    with pytest.raises(UnsupportedGraph, match="too few lengths near"):
        Grid(graph(1, lambda point: point[0] in lengths), (5,))


@pytest.mark.parametrize(("base", "far"), [(12, far) for far in (6, 7, 27, 19, 17, 15, 9)])
def test_the_far_point_may_be_any_of_seven(base, far):
    made = Grid(graph(1, lambda point: point[0] in (base, base + 1, far)), (base,))
    assert made.points == [(base,), (base + 1,), (far,)]


def test_each_length_has_to_have_a_near_one():
    """The far point alone says nothing of how sizes grow with the second length."""
    with pytest.raises(UnsupportedGraph, match="too few lengths near"):
        Grid(graph(2, lambda point: point[1] in (5, 13)), (8, 5))


UNITS = {  # sizes of a graph at a height and a width, and the unit in which they are counted
    "tokens alone": (lambda h, w: [h * w, h + 1], 1),
    "patches of two": (lambda h, w: [h // 2 * (w // 2), w], 2),
    "cut about the middle": (lambda h, w: [h // 2 * (w // 2), (32 - h // 2) // 2], 4),
    "halves of halves, and a float": (lambda h, w: [h // 2 // 2 // 2 * w, float(h // 2) / 16], 8),
}


@pytest.mark.parametrize("name", UNITS)
def test_sides_are_counted_in_the_first_unit_that_does(name):
    sizes, unit = UNITS[name]
    made = Grid(graph(2, sides=(1, 1), sizes_at=lambda lengths: sizes(*lengths)), (48, 64))
    assert made.units == (unit, unit) and made.points[0] == (48 // unit, 64 // unit)
    for lengths in ((64, 48), (56, 72)):
        assert made.takes(lengths) and made.fits(lengths) and made.lengths_at(made.point_at(lengths)) == lengths
    if unit > 1:
        assert not made.takes((49, 64)) and not made.fits((49, 64))
        assert Grid(made.graph, (49, 64)).takes((49, 72))


def test_a_side_that_nothing_cuts_is_counted_in_ones():
    """Three frames of a video would be one pair of frames, too few to find others from."""
    made = Grid(
        graph(2, sides=(1, 1), sizes_at=lambda lengths: [lengths[0] * (lengths[1] // 2)], cut=(False, True)), (3, 20)
    )
    assert made.units == (1, 2) and made.takes((4, 20)) and not made.takes((3, 21))


def test_what_fits_no_unit_has_no_grid():
    with pytest.raises(UnsupportedGraph, match="is height, no sum of products"):
        Grid(graph(1, sides=(1,), sizes_at=lambda lengths: [lengths[0] ** 2]), (48,))
    assert Grid(graph(1, sides=(2,), sizes_at=lambda lengths: [lengths[0] ** 2]), (48,)).fits((50,)), "a square"


def test_sizes_that_differ_at_one_length_alone_are_seen_there():
    made = Grid(graph(1, sides=(1,), sizes_at=lambda lengths: [max(lengths[0], 4)]), (48,))
    assert made.fits((20,)) and not made.fits((3,))


def test_points_leave_out_the_sizes_at_which_slices_take_all():
    made = Grid(graph(1, sides=(1,), cuts=lambda lengths: [lengths[0] < 48]), (47,))
    assert max(made.points) == (47,)


def test_wide_pictures_and_tall_ones_are_apart_where_the_larger_side_is_taken():
    """A square is one of either; the points are on the same side of it as the present lengths."""

    def largest(lengths):
        return [{place for place in (0, 1) if lengths[place] == max(lengths)}]

    made = Grid(graph(2, sides=(1, 1), sizes_at=lambda lengths: [max(lengths)], largest=largest), (9, 9))
    assert all(height >= width for height, width in made.points)
    assert made.takes((7, 7)) and made.fits((8, 5)) and not made.takes((5, 8)) and not made.fits((5, 8))
