"""A model that takes its process's tokens out of the whole latent: the only split that makes them the region."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from ras_compile.passes.algebra.layout import (
    Axis,
    Concat,
    Dim,
    Exclude,
    Frame,
    Group,
    Layout,
    Sharded,
    Sizes,
    Unbatch,
    dim_size,
)
from ras_compile.passes.algebra.order import Atom, Order
from ras_compile.passes.rules.concatenation import exclude_minor, own_shard, sparse_offset
from ras_compile.passes.rules.registry import Call

WHOLE, SECOND = Frame.of((2, 6, 4)), Group("all", 3, 1)


def taken(
    frame: Frame = WHOLE,
    lengths: tuple[int, ...] = (2, 2, 2),
    pieces: tuple[int, ...] = (1,),
    group: Group | None = SECOND,
    layout: Layout | None = None,
    dim: int = 1,
) -> tuple[int, int] | None:
    """The tokens of a split of which some pieces are used."""
    graph = fx.Graph()
    split = graph.call_function(torch.ops.aten.split.Tensor, (graph.placeholder("latent"), 2, dim))
    for piece in pieces:
        graph.call_function(operator.getitem, (split, piece))
    frame = frame.across(group, None)
    try:
        own_shard(Call(split, {}, frame), layout or frame.layout(), dim, lengths)
    except Sharded as own:
        return own.start, own.stop
    return None


@pytest.mark.parametrize("rank", range(3))
def test_a_process_takes_the_tokens_of_its_rank(rank):
    assert taken(group=Group("all", 3, rank), pieces=(rank,)) == (2 * rank, 2 * rank + 2)
    assert taken(group=Group("all", 3, rank), pieces=(rank, rank)) == (2 * rank, 2 * rank + 2)


@pytest.mark.parametrize(
    "other",
    [
        {"group": None},
        {"frame": Frame.of((2, 6, 4), window=(2, 4))},  # it was found already
        {"frame": Frame.of((2, 6, 4, 1))},
        {"lengths": (2, 3, 1)},
        {"lengths": (3, 3)},
        {"dim": 2},
        {"layout": Layout((WHOLE.atoms(0), (*WHOLE.atoms(1), Axis(3)), WHOLE.atoms(2)))},
        {"pieces": (0,)},
        {"pieces": (0, 1)},  # it takes others, too
        {"pieces": ()},
    ],
    ids=str,
)
def test_any_other_split_is_none_of_the_processes(other):
    assert taken(**other) is None


TOKENS, TEXT = WHOLE.atoms(1), (Axis(4),)
ACTIVE = Sizes(Frame((2, 6, 4), ((2,), (6,), (4,)), excluded=frozenset([Atom(2, 1)])), 3)
FROZEN = Sizes(ACTIVE.frame, 3, context=False)
Case = tuple[Dim, dict[int, int], dict[int, int]]  # of borders that do not go through tokens, where they stand
BORDERS: dict[str, Case] = {
    "nothing beside": (TOKENS, {0: 0, 6: 3}, {0: 0, 6: 3}),
    "a text": (TEXT, {0: 0, 1: 1, 4: 4}, {0: 0, 1: 1, 4: 4}),
    "a text in front": ((Concat((TEXT, TOKENS)),), {0: 0, 2: 2, 4: 4, 10: 7}, {0: 0, 2: 0, 4: 0, 10: 3}),
    "a text behind": ((Concat((TOKENS, TEXT)),), {0: 0, 6: 3, 7: 4, 10: 7}, {0: 0, 6: 3, 7: 3, 10: 3}),
    "on both sides": (
        (Concat((TEXT, TOKENS, (Axis(2),))),), {3: 3, 4: 4, 10: 7, 11: 8, 12: 9}, {3: 0, 4: 0, 10: 3, 11: 3, 12: 3}
    ),
    "several of each token": ((Axis(3), *TOKENS), {0: 0, 6: 3, 12: 6, 18: 9}, {0: 0, 6: 3, 12: 6, 18: 9}),
}  # fmt: skip


@pytest.mark.parametrize("name", BORDERS)
def test_borders_stand_behind_what_is_left_of_what_was_before_them(name):
    dim, among, alone = BORDERS[name]
    for offset, place in among.items():
        assert sparse_offset(dim, offset, ACTIVE) == place
        assert sparse_offset(dim, offset, FROZEN) == alone[offset]
    assert sparse_offset(dim, dim_size(dim) + 5, ACTIVE) == ACTIVE.dim(dim), "a slice may end behind the end"


def excluded(frame: Frame, *dims: Dim) -> frozenset[Atom] | str:
    """What leaves the region where these dimensions are taken apart; "samples" where it is they."""
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.unbind.int, (graph.placeholder("x"),))
    try:
        exclude_minor(Call(node, {}, frame), dims)
    except Exclude as fact:
        return fact.atoms
    except Unbatch as fact:
        assert fact.apart
        return "samples"
    return frozenset()


@pytest.mark.parametrize(
    ("shape", "dim", "wanted"),
    [
        ((1, 3, 4), 1, False),
        ((1, 2, 4), 1, True),
        ((1, 5, 24), 1, False),
        ((1, 5, 25), 1, True),
        ((1, 5, 5, 1), 1, True),  # of four sizes dimension 1 mostly holds channels
        ((1, 6, 5, 1), 1, False),
        ((1, 4, 5, 3), 2, False),
        ((1, 4, 5, 7), 2, True),
    ],
    ids=str,
)
def test_what_is_taken_apart_leaves_the_grid_where_it_is_its_minor_part(shape, dim, wanted):
    frame = Frame.of(shape)
    assert excluded(frame, frame.atoms(dim)) == (frozenset([Atom(dim, 1)]) if wanted else frozenset())


def test_samples_that_are_taken_apart_share_their_rows():
    assert excluded(Frame.of((2, 4, 1)), Frame.of((2, 4, 1)).atoms(0)) == "samples"
    assert excluded(Frame.of((2, 3, 1)), Frame.of((2, 3, 1)).atoms(0)) == frozenset(), "too few tokens"


def test_parts_of_an_order_stay_in_the_grid():
    frame = Frame.of((1, 2, 8, 8))
    order = Order.of(((Atom(2, 1), 8), (Atom(3, 1), 8)), torch.randperm(64))
    assert excluded(frame, (*frame.atoms(1), Axis(64, Atom(-1, 1, order)))) == frozenset()
    assert excluded(frame, frame.atoms(1)) == frozenset([Atom(1, 1)])
