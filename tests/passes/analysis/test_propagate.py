"""Facts that stop a propagation or start it over, apart from whole models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn

from ras_compile.capture.export import capture
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Axis, Frame, Group, Layout
from ras_compile.passes.algebra.order import RANKS, Atom, Order
from ras_compile.passes.analysis.propagate import check, of_region, propagate, same_rows, torn
from ras_compile.passes.rules.registry import Call, Gather, Step, Use

aten = torch.ops.aten
OWN = Layout(((Axis(5, Atom(1, 1)),), (Axis(3),)))  # [N, C]
BOTH = Group("all", 2, 0)
ALL = Layout(((Axis(2, RANKS), Axis(5, Atom(1, 1))), (Axis(3),)))


def added(first: Layout | None, second: Layout | None, *, group: Group | None = BOTH) -> Call:
    graph = fx.Graph()
    operands = [graph.placeholder(name) for name in "ab"]
    node = graph.call_function(aten.add.Tensor, tuple(operands))
    layouts = dict(zip(operands, (first, second), strict=True))
    return Call(node, layouts, Frame.of((1, 5, 3)).across(group, None))


@pytest.mark.parametrize(
    ("first", "second", "out", "wanted"),
    [
        (OWN, OWN, OWN, True),
        (ALL, ALL, ALL, True),
        (ALL, OWN, ALL, False),
        (OWN, OWN, ALL, False),
        (OWN, OWN, None, True),
        (ALL, ALL, None, False),  # what is made of the rows of all would be taken for this process's
    ],
)
def test_rows_of_one_process_do_not_meet_those_of_all(first, second, out, wanted):
    assert same_rows(added(first, second), Step(out, (Use.ROWS, Use.ROWS))) == wanted
    assert same_rows(added(first, second, group=None), Step(out, (Use.ROWS, Use.ROWS))), "alone there are no others"


def test_what_is_read_by_rows_meets_them_too():
    assert same_rows(added(OWN, None), Step(OWN, (Use.ROWS, Gather(OWN))))
    assert not same_rows(added(OWN, None), Step(OWN, (Use.ROWS, Gather(ALL))))


def test_a_latent_that_was_moved_before_it_was_cut_into_patches_is_torn():
    order = Order.of(((Atom(1, 1), 4),), torch.tensor([1, 2, 3, 0]))
    moved = Layout(((Axis(4, Atom(1, 1, order)),),), raw=True)
    call = added(moved, None)
    first, second = call.operands
    assert torn(call.node, {first: moved, second: None})
    assert not torn(None, {}), "nothing is lost"
    assert not torn(call.node, {first: moved, second: (moved, None)}), "a value of several parts is no latent"
    assert not torn(call.node, {first: Layout(moved.dims), second: None}), "features are not the latent"
    assert not torn(call.node, {first: Layout(((Axis(4, Atom(1, 1)),),), raw=True)}), "it was not moved"


class Sorted(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent.flatten().sort()[0].exp()


def test_where_tokens_are_lost_is_told():
    inputs = [torch.randn(1, 6, 4)]
    graph = capture(torch.export.export(Sorted(), tuple(inputs)).module(), inputs).graph
    (latent,) = graph.find_nodes(op="placeholder")
    with pytest.raises(UnsupportedGraph, match=r"tokens are lost in aten\.sort") as raised:
        propagate(graph, latent, Frame.of((1, 6, 4)))
    assert "patches" not in str(raised.value), "the latent was not moved"


def test_beside_its_own_tokens_a_process_takes_those_of_all_for_any_values():
    """Where a node has none of its own, its rule goes by those of all."""
    graph = fx.Graph()
    mine, everyones, other = (graph.placeholder(name) for name in ("mine", "everyones", "other"))
    layouts = {mine: OWN, everyones: ALL, other: None}
    own = SimpleNamespace(stretch=(0, 5), carries=lambda layout: layout is OWN)

    def known(frame, *operands):
        return of_region(graph.call_function(aten.cat.default, (list(operands),)), layouts, frame)

    assert known(own, mine, everyones, other) == {mine: OWN}
    assert known(own, everyones, other) == {everyones: ALL}
    assert known(SimpleNamespace(stretch=None), mine, everyones, other) is layouts


@pytest.mark.parametrize("results", [1, 2])
def test_a_rule_whose_layout_has_other_sizes_than_the_value_is_refused(results):
    graph, right = fx.Graph(), Layout(((Axis(5, Atom(1, 1)),), (Axis(3),)))
    node = graph.call_function(aten.relu.default, (graph.placeholder("x"),))
    value = torch.empty(5, 3)
    node.meta["val"] = value if results == 1 else (torch.empty(7), value)
    check(node, Step(right if results == 1 else (None, right), ()))
    check(node, Step(None, ()))
    wrong = Layout(((Axis(5, Atom(1, 1)),), (Axis(4),)))
    with pytest.raises(UnsupportedGraph, match="for a value of shape"):
        check(node, Step(wrong if results == 1 else (None, wrong), ()))
