"""Whose tokens the rows of attention belong to, where it runs on whole operands."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ras_compile.passes.algebra.layout import Axis, Frame, Layout
from ras_compile.passes.algebra.order import Atom
from ras_compile.passes.rules.attention import of_rows
from ras_compile.passes.rules.registry import Call

FRAME = Frame((2, 12, 6), ((2,), (12,), (6,)), excluded=frozenset([Atom(2, 1)]))  # [B, N, C]
SAMPLES, TOKENS = FRAME.atoms(0), FRAME.atoms(1)
HEADS, WIDTH = (Axis(4),), (Axis(3),)


@pytest.mark.parametrize(
    ("query", "shape", "kept"),
    [
        ((SAMPLES, HEADS, TOKENS, WIDTH), (2, 4, 12, 5), True),
        ((TOKENS, HEADS, SAMPLES, WIDTH), (12, 4, 2, 5), True),
        ((SAMPLES, HEADS, WIDTH, TOKENS), (2, 4, 3, 5), False),  # the scores sum over tokens
        ((TOKENS, HEADS, WIDTH, SAMPLES), (12, 4, 3, 5), False),  # or over samples
        ((SAMPLES, (), TOKENS, WIDTH), (2, 4, 12, 5), False),  # keys have more heads
        (None, (2, 4, 12, 5), False),
    ],
    ids=str,
)
def test_each_row_of_the_result_is_its_query_s(query, shape, kept):
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in ("query", "key", "value")]
    node = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, tuple(given))
    node.meta["val"] = torch.empty(shape)
    layout = None if query is None else Layout(query)
    found = of_rows(Call(node, {given[0]: layout}, FRAME), given[0])
    assert found == (Layout((*query[:-1], (Axis(5),))) if kept else None)
