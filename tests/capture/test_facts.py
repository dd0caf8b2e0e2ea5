"""Facts about a call's inputs: which inputs are read, what depends on them, and whether they still hold."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ras_compile.capture.facts import Fact, Guard

aten = torch.ops.aten
MASK, WEIGHT, CONSTANT = torch.tensor([1, 1, 0]), torch.tensor([2.0]), torch.tensor([3.0])


def graph(mask, unread, weight, constant):
    length = aten.sum.default(mask)
    return length, aten.mul.Tensor(weight, constant), aten.nonzero.default(mask), aten.sum.default(mask)


@pytest.fixture
def guard() -> Guard:
    values = graph(MASK, None, WEIGHT, CONSTANT)
    sources = ["the length", "the product", "the places", "the length again"]
    facts = [Fact(value, source) for value, source in zip(values, sources, strict=True)]
    return Guard(fx.symbolic_trace(graph), facts, [CONSTANT])


def test_inputs_that_facts_read(guard):
    """No others, and no constants: calls are compared by them."""
    assert guard.reads == [0, 2]


def test_what_depends_on_an_input(guard):
    """One value that is read twice is one fact, told by where it was read first."""
    assert [fact.source for fact in guard.facts_depending_on(0)] == ["the length", "the places"]
    assert [fact.source for fact in guard.facts_depending_on(2)] == ["the product"]
    assert guard.facts_depending_on(1) == []


@pytest.mark.parametrize(
    ("mask", "weight", "holds"),
    [
        (MASK, WEIGHT, True),
        (MASK.clone(), WEIGHT.clone(), True),
        (torch.tensor([1, 0, 1]), WEIGHT, False),  # as many, elsewhere
        (torch.tensor([1, 1, 1]), WEIGHT, False),
        (torch.tensor([2, 0, 0]), WEIGHT, False),  # the same sum, and fewer places
        (MASK, torch.tensor([2.5]), False),
    ],
)
def test_facts_hold_as_long_as_all_are_equal(guard, mask, weight, holds):
    assert guard.holds([mask, torch.ones(1), weight]) is holds
