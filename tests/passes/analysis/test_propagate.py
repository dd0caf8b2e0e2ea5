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
from ras_compile.passes.analysis import propagate as module
from ras_compile.passes.analysis.propagate import (
    Analysis,
    check,
    of_all_tokens,
    of_region,
    propagate,
    same_rows,
    together,
    torn,
)
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
    assert module.holds_region((OWN, None), own) and module.holds_region((ALL, OWN), own)
    assert not module.holds_region((ALL, None), own) and module.holds_region(None, SimpleNamespace(stretch=None))


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


def of(model: nn.Module, *inputs: Tensor) -> Analysis:
    graph = capture(torch.export.export(model, inputs).module(), list(inputs)).graph
    latent = graph.find_nodes(op="placeholder")[0]
    return propagate(graph, latent, Frame.of(latent.meta["val"].shape))


class Mixed(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return torch.softmax(latent @ latent.transpose(-1, -2), -1) @ latent


def test_a_latent_of_one_dimension_beside_its_channels_has_tokens_there_if_they_are_mixed():
    found = of(Mixed(), torch.randn(6, 4)).frame
    assert (found.batch, found.tokens, found.samples) == (None, 6, 1)
    assert (of(Mixed(), torch.randn(2, 6, 4)).frame.tokens, of(Mixed(), torch.randn(2, 6, 4)).frame.samples) == (6, 2)


class Projected(nn.Module):
    """Its channels are known to be some before its tokens are known to meet."""

    def forward(self, latent: Tensor, weight: Tensor) -> Tensor:
        found = latent @ weight
        return torch.softmax(found @ found.transpose(-1, -2), -1) @ found


def test_what_is_left_of_a_latent_without_channels_is_tokens_if_they_meet():
    found = of(Projected(), torch.randn(6, 4), torch.randn(4, 4)).frame
    assert (found.batch, found.tokens) == (None, 6)


def test_a_latent_that_nobody_pads_is_not_looked_at_as_padded():
    assert not of(Mixed(), torch.randn(2, 6, 4)).frame.padded


class Sorts(nn.Module):
    def forward(self, latent: Tensor, text: Tensor) -> Tensor:
        return latent + latent.sort(1)[0].exp() * text.sin()


def test_what_is_made_of_lost_tokens_is_told_to_rules(monkeypatch):
    told, real = {}, module.one_step

    def noting(graph, call, apart):
        told[call.node.name] = {node.name for node in call.mixed}
        return real(graph, call, apart)

    monkeypatch.setattr(module, "one_step", noting)
    of(Sorts(), torch.randn(1, 6, 4), torch.randn(4))
    assert told["add"] == {"sort", "getitem", "exp", "mul", "add"}, "and nothing that is made of the text alone"


class Channels(nn.Module):
    def forward(self, latent: Tensor, weight: Tensor) -> Tensor:
        return latent @ weight


def test_samples_that_meet_nowhere_are_no_tokens():
    with pytest.raises(UnsupportedGraph, match="no token grid"):
        of(Channels(), torch.randn(6, 4), torch.randn(4, 4))
    with pytest.raises(UnsupportedGraph, match="is empty"):
        of(Channels(), torch.randn(0, 4), torch.randn(4, 4))


class Parts(nn.Module):
    """Tokens are worked in two parts, and joined again."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.sliced = sliced

    def forward(self, latent: Tensor, weight: Tensor) -> Tensor:
        cut = [latent[:, :3], latent[:, 3:]] if self.sliced else latent.chunk(2, 1)
        parts = [torch.relu(part @ weight) for part in cut]
        joined = torch.cat(parts, 1)
        return nn.functional.scaled_dot_product_attention(joined, joined, joined)


@pytest.mark.parametrize("sliced", [False, True])
def test_of_parts_that_are_worked_together_nothing_is_left(sliced):
    found = of(Parts(sliced), torch.randn(1, 6, 4), torch.randn(4, 4))
    there = set(found.graph.nodes)
    assert found.layouts.keys() <= there and found.steps.keys() <= there
    assert found.frame.tokens == 6 and not found.graph.find_nodes(op="call_function", target=aten.cat.default)
    (attention,) = found.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert found.steps[attention].uses == (Use.ROWS, Use.WHOLE, Use.WHOLE)


def test_a_value_whose_parts_are_apart_is_looked_at_again_when_another_s_are_joined(monkeypatch):
    graph, asked = fx.Graph(), []
    one, two = (graph.call_function(aten.chunk.default, (graph.placeholder(name), 2)) for name in "ab")
    answers = [False, False, True, True]
    monkeypatch.setattr(module, "join_parts", lambda graph, node: (asked.append(node), answers.pop(0))[1])
    apart: set[fx.Node] = set()
    assert not together(graph, one, apart) and not together(graph, one, apart) and asked == [one]
    assert not together(graph, two, apart) and apart == {one.args[0], two.args[0]}
    graph.call_function(aten.chunk.default, (one, 2))
    third = graph.call_function(aten.chunk.default, (two, 2))
    assert together(graph, third, apart) and not apart
    assert together(graph, one, apart)


class Overlapping(nn.Module):
    """A convolution of three by three takes every second entry; the picture is put back together by repeating."""

    def forward(self, latent: Tensor, kernel: Tensor) -> Tensor:
        few = nn.functional.conv2d(latent, kernel, stride=2, padding=1)
        return nn.functional.interpolate(few, scale_factor=2, mode="nearest") + latent


def test_what_a_stride_takes_together_is_one_token_where_the_finer_ones_are_lost():
    found = of(Overlapping(), torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3))
    assert found.frame.tokens == 16 and found.frame.grid == (4, 4)
    (mixing,) = [node for node, step in found.steps.items() if step.whole]
    assert mixing.target is aten.conv2d.default and found.layouts[mixing].shape == (1, 4, 4, 4)


def test_tokens_of_all_processes_are_computed_as_they_are():
    call = added(OWN, OWN)
    for node in (call.node, *call.operands):
        node.meta["val"] = torch.empty(5, 3)
    found = of_all_tokens(call)
    assert found.whole and found.out == OWN and found.uses == (Use.SAME, Use.SAME)
