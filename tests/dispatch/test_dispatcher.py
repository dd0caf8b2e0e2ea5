"""The key of a call: whatever a program was made for tells calls apart."""

from __future__ import annotations

import pytest
import torch

from ras_compile.dispatch.dispatcher import key_of, places_given, worth_tracing
from ras_compile.dispatch.kinds import GraphBreak
from ras_compile.errors import UnsupportedGraph

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(4, 3), torch.zeros(2, 3, 1), torch.zeros(3, 2).t(), torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, device="meta"), 0.0, None,
    ],
    ids=["shape", "rank", "strides", "dtype", "whole numbers", "device", "a number", "nothing"],
)  # fmt: skip
def test_tensors_that_differ_in_what_programs_are_made_for(other):
    assert key_of([X, 1]) != key_of([other, 1]) and key_of([1, X]) != key_of([1, other])


def test_tensors_that_differ_in_their_values_alone():
    assert key_of([X]) == key_of([torch.ones(2, 3)]) and hash(key_of([X])) == hash(key_of([X + 1]))


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 2), (1, 1.0), (1, True), (0, False), (1, "1"), (None, "None"), (0.1, 0.2), ("a", "b")],
    ids=repr,
)
def test_other_arguments_differ_by_type_and_text(one, other):
    assert key_of([one]) != key_of([other]) and key_of([one]) == key_of([one])
    assert key_of([float("nan")]) == key_of([float("nan")])


def test_the_order_of_arguments_counts():
    assert key_of([1, 2]) != key_of([2, 1]) and key_of([X]) != key_of([X, X])


@pytest.mark.parametrize("places", [torch.arange(3), torch.arange(2, dtype=torch.int32)], ids=str)
def test_a_vector_of_whole_numbers_may_be_places(places):
    assert places_given([X, 1.0, places]) and places_given([places])


@pytest.mark.parametrize(
    "other", [X, X[0], torch.arange(1), torch.arange(4)[None], torch.arange(3) > 1, 3, [1, 2]], ids=str
)
def test_other_arguments_are_no_places(other):
    assert not places_given([other]) and not places_given([])


@pytest.mark.parametrize("broken", [True, False])
@pytest.mark.parametrize("given", [[torch.arange(3)], [X]], ids=["places", "no places"])
def test_a_refused_model_is_traced_where_dynamo_broke_it_or_an_argument_may_be_places(broken, given):
    error = GraphBreak("a part of a model", "here", ("model.py", 3)) if broken else UnsupportedGraph("no tokens")
    assert worth_tracing(error, given) is (broken or given[0] is not X)
