"""A model that takes its process's tokens out of the whole latent: the only split that makes them the region."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from ras_compile.passes.algebra.layout import Axis, Frame, Group, Layout, Sharded
from ras_compile.passes.rules.concatenation import own_shard
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
