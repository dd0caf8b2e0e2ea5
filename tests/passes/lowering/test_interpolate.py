"""One program from its forms at several lengths."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ras_compile.passes.lowering.interpolate import Form, NotAffine, fit, interpolate, sample_points

aten = torch.ops.aten
POINTS = sample_points((7,), [-1], (3,))


def program(length: int, build, held: dict | None = None) -> fx.GraphModule:
    """`build(graph, x, length)` appends the ops of a program of `x` [2, length, 4]."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, length, 4, device="meta")
    graph.output((build(graph, x, length),))
    return fx.GraphModule(held or {}, graph)


def joined(build) -> fx.GraphModule:
    return interpolate([program(point[0], build) for point in POINTS], POINTS)


def view(size):
    return lambda graph, x, length: graph.call_function(aten.view.default, (x, [-1, size(length)]))


def test_points_and_fits():
    points = sample_points((7, 20), [-1, 1], (3, 9))
    assert points == [(7, 20), (6, 20), (7, 21), (3, 9)]
    assert fit(points, [2 * a - b + 5 for a, b in points]) == Form(((5, (0, 0)), (2, (1, 0)), (-1, (0, 1))))
    assert fit(points, [4] * 4) == Form(((4, (0, 0)),))
    assert fit(points, [a * b for a, b in points]) is None
    assert fit(points, [-(-a // 4) * 4 + b for a, b in points]) is None
    assert fit(sample_points((8,), [-2], (3,)), [8, 7, 5]) is None  # half a step for each: no whole multiple
    assert Form(((5, (0, 0)), (2, (1, 0)), (-1, (0, 1))))((10, 1)) == 24


def test_sides_of_a_picture_are_multiplied():
    points = sample_points((7, 20, 5), [-1, 1, 2], (3, 9, 40), (1, 1, 0))
    assert points == [(7, 20, 5), (6, 20, 5), (7, 21, 5), (7, 20, 7), (6, 21, 5), (3, 9, 40)]
    found = fit(points, [3 * a * b - a + 2 * c for a, b, c in points])
    assert found == Form(((-1, (1, 0, 0)), (2, (0, 0, 1)), (3, (1, 1, 0)))) and found.varies
    assert fit(points, [a * c for a, b, c in points]) is None
    square = sample_points((4,), [1], (9,), (2,))
    assert square == [(4,), (5,), (6,), (9,)] and fit(square, [a * a + 1 for (a,) in square])((10,)) == 101
    assert fit(square, [a**3 for (a,) in square]) is None


def test_numbers_become_functions_of_the_length():
    module = joined(view(lambda length: 4 * length))
    for length in (2, 7, 50):
        x = torch.randn(2, length, 4)
        assert torch.equal(module(length, x)[0], x.view(-1, 4 * length))
    assert [node.meta["sizes"] for node in module.graph.nodes if node.name == "x"] == [
        [((2, size, 4), (4 * size, 4, 1)) for (size,) in POINTS]
    ]


def other_op(graph, x, length):
    return graph.call_function(aten.neg.default if length == 3 else aten.abs.default, (x,))


def other_operand(graph, x, length):
    y = graph.call_function(aten.neg.default, (x,))
    return graph.call_function(aten.abs.default, (x if length == 3 else y,))


def more_ops(graph, x, length):
    for _ in range(2 if length == 3 else 1):
        x = graph.call_function(aten.neg.default, (x,))
    return x


def a_fraction(graph, x, length):
    return graph.call_function(aten.mul.Tensor, (x, 1 / length))


def other_rank(graph, x, length):
    return graph.call_function(aten.view.default, (x, [-1] * (1 + (length == 3))))


@pytest.mark.parametrize(
    "build",
    [
        view(lambda length: length * length),
        view(lambda length: -(-length // 4) * 4),
        view(lambda length: max(length, 5)),
        other_op,
        other_operand,
        more_ops,
        a_fraction,
        other_rank,
    ],
)
def test_what_is_not_one_program_is_refused(build):
    with pytest.raises(NotAffine):
        joined(build)


def test_a_constant_must_be_the_same():
    def constant(graph, x, length):
        return graph.call_function(aten.add.Tensor, (x, graph.get_attr("table")))

    made = [program(point[0], constant, {"table": torch.ones(4)}) for point in POINTS]
    assert torch.equal(interpolate(made, POINTS)(5, torch.zeros(2, 5, 4))[0], torch.ones(2, 5, 4))
    made[-1] = program(3, constant, {"table": torch.zeros(4)})
    with pytest.raises(NotAffine, match="table"):
        interpolate(made, POINTS)
