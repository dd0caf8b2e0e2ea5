"""Which operand of a view carries the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Frame
from ras_compile.passes.rules.registry import Call
from ras_compile.passes.rules.views import only_layout


def test_the_one_operand_that_may_carry_tokens():
    frame, graph = Frame.of((1, 5, 3)), fx.Graph()
    value, places = graph.placeholder("value"), graph.placeholder("places")
    node = graph.call_function(torch.ops.aten.index_select.default, (value, 1, places))
    layout = frame.layout()
    assert only_layout(Call(node, {value: layout}, frame)) is layout
    for layouts in ({}, {places: layout}, {value: layout, places: layout}):
        with pytest.raises(UnsupportedGraph, match="an operand other than `self`"):
            only_layout(Call(node, layouts, frame))
