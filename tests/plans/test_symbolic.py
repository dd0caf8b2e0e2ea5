"""What is assumed of symbolic lengths, and slices that are none."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ras_compile.errors import UnsupportedGraph
from ras_compile.plans import symbolic
from ras_compile.plans.symbolic import Symbols, takes_all


def test_assumptions_are_held_against_other_lengths():
    symbols = Symbols((6, 9))
    assert symbols.holds((6, 9)) and symbols.holds((7, 4))
    assert bool(symbols.lengths[0] % 2 == 0)
    assert symbols.holds((8, 4)) and not symbols.holds((7, 4)), "the first one was taken to be even"
    assert bool(symbols.lengths[1] > 5)
    assert symbols.holds((8, 7)) and not symbols.holds((8, 5))


def test_a_length_that_was_fixed_or_is_too_short():
    symbols = Symbols((6, 9))
    assert not symbols.holds((6, 1)), "sizes of one are another graph"
    assert int(symbols.lengths[0]) == 6
    assert symbols.holds((6, 4)) and not symbols.holds((7, 4))
    same = Symbols((6, 6))
    assert bool(same.lengths[0] == same.lengths[1])
    assert same.holds((8, 8)) and not same.holds((8, 9))


def test_fake_tensors_of_the_lengths():
    symbols = Symbols((6,))
    (length,) = symbols.lengths
    made = symbols.tensor([2, length], [length, 1], torch.empty(1, dtype=torch.float16))
    assert made.shape[1].node.expr == symbols.symbols[0] and made.stride()[0].node.expr == symbols.symbols[0]
    assert made.dtype == torch.float16
    assert symbols.fake(torch.empty(6, 6)).shape == (6, 6), "a size that happens to be a length stays a number"


@pytest.mark.parametrize(
    ("given", "everything"),
    [
        ((), True),
        ((1,), True),
        ((1, 0), True),
        ((1, None, None), True),
        ((1, 0, 5), True),
        ((1, 0, 2**63 - 1, 1), True),
        ((1, 1), False),
        ((1, 0, 4), False),
        ((0, 0, 4), True),
        ((1, 0, 5, 2), False),
    ],
)
def test_a_slice_of_everything(given, everything):
    graph = fx.Graph()
    value = graph.placeholder("value")
    value.meta["val"] = torch.empty(4, 5)
    assert takes_all(graph.call_function(torch.ops.aten.slice.Tensor, (value, *given))) == everything
    assert not takes_all(graph.call_function(torch.ops.aten.select.int, (value, 0, 0)))


@pytest.mark.parametrize("kind", ["is_flex", "is_transform"])
def test_what_is_captured_for_one_length_at_a_time(kind, monkeypatch):
    monkeypatch.setattr(symbolic, kind, lambda node: True)
    graph = fx.Graph()
    graph.output(graph.placeholder("value"))
    with pytest.raises(UnsupportedGraph, match="one length of the context at a time"):
        symbolic.SymbolicGraph(fx.GraphModule({}, graph), None, [])
