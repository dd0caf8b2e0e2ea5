"""What is computed twice: by the same op, from the same values, with the same arguments."""

from __future__ import annotations

import torch
from torch import fx

from ras_compile.passes.programs.equals import equals

aten = torch.ops.aten


def test_equal_nodes_are_found_through_equal_operands():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    call = graph.call_function
    a, b = call(aten.neg.default, (x,)), call(aten.neg.default, (x,))
    over_a, over_b = call(aten.mul.Tensor, (a, y)), call(aten.mul.Tensor, (b, y))
    turned, other = call(aten.mul.Tensor, (y, b)), call(aten.neg.default, (y,))
    one, yes, real = (call(aten.add.Tensor, (x, value)) for value in (1, True, 1.0))
    first = equals(graph, lambda node: True)
    assert first[b] is a and first[over_b] is over_a
    assert all(first[node] is node for node in (a, over_a, turned, other, one, yes, real))
    left = equals(graph, lambda node: node is not b)
    assert b not in left and left[over_b] is over_b, "what may not be taken for another keeps what is made of it apart"
