"""Which processes a model's collectives join, what one of them holds and sends: without any process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Axis, Frame, Group
from ras_compile.passes.algebra.order import RANKS
from ras_compile.passes.rules import collectives
from ras_compile.passes.rules.collectives import COLLECTIVES, EXCHANGES, GATHERED, joined_by, known, part_of, sent_by
from ras_compile.passes.rules.registry import Call

pytestmark = pytest.mark.skipif(not COLLECTIVES, reason="this PyTorch is built for one process")
FRAME = Frame.of((1, 8, 3))
GROUPS = {"four": ((0, 1, 2, 3), 2), "again": ((0, 1, 2, 3), 2), "two": ((0, 1), 1)}


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    monkeypatch.setattr(collectives, "process_group", GROUPS.__getitem__)


def calling(*called: tuple[Any, str]) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target, group in called:
        names = [argument.name for argument in target._schema.arguments]
        graph.call_function(target, (x,), {"group_name": group} if "group_name" in names else {})
    return graph


@pytest.mark.parametrize("target", COLLECTIVES, ids=str)
@pytest.mark.parametrize("beside", [[], [("all_reduce", "again")]], ids=str)
def test_who_exchanges_tokens_shards_them_and_who_adds_up_has_all(target, beside):
    also = [(known(name)[0], group) for name, group in beside]
    frame, group = joined_by(calling((target, "four"), *also), FRAME), Group("four", 4, 2)
    assert (frame.shards, frame.replicas) == ((group, None) if target in EXCHANGES else (None, group))


def test_a_model_without_collectives_has_no_group():
    frame = joined_by(calling((torch.ops.aten.relu.default, "")), FRAME)
    assert frame.shards is frame.replicas is frame.group is None


def test_processes_of_two_groups_are_refused():
    with pytest.raises(UnsupportedGraph, match="collectives of 2 groups of processes"):
        joined_by(calling((COLLECTIVES[0], "four"), (COLLECTIVES[0], "two")), FRAME)


@pytest.mark.parametrize(
    ("dim", "wanted"),
    [
        ((Axis(8),), (Axis(2),)),
        ((Axis(4),), ()),
        ((Axis(8), Axis(3, FRAME.atoms(2)[0].atom)), (Axis(2), Axis(3, FRAME.atoms(2)[0].atom))),
        ((Axis(4, RANKS), *FRAME.atoms(1)), FRAME.atoms(1)),
        ((Axis(6),), None),  # not in equal parts
        (FRAME.atoms(1), None),  # they are no process's
        ((), None),
    ],
    ids=str,
)
def test_what_one_process_has_of_a_dimension(dim, wanted):
    graph = calling((COLLECTIVES[0], "four"))
    call = Call(list(graph.nodes)[-1], {}, FRAME.across(Group("four", 4, 2), None))
    assert part_of(call, dim) == wanted
    assert part_of(Call(list(graph.nodes)[-1], {}, FRAME), dim) is None, "one process alone"


@pytest.mark.parametrize("target", COLLECTIVES, ids=str)
def test_what_one_process_sends(target):
    """Of 16 entries: all to three others where they are gathered; a quarter to each of three; twice that where they are summed."""
    node = list(calling((target, "four")).nodes)[-1]
    wanted = 48 if target in GATHERED else 24 if target in known("all_reduce") else 12
    assert sent_by(node, (8, 2)) == wanted
