"""What is assumed of symbolic lengths, and slices that are none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from symbols import dynamic_graph
from torch import Tensor, fx, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from ras_compile import notices
from ras_compile.capture import export
from ras_compile.capture.inputs import describe_inputs
from ras_compile.capture.repeats import NotRepeated
from ras_compile.errors import UnsupportedGraph
from ras_compile.plans import symbolic
from ras_compile.plans.lengths import Lengths, Region
from ras_compile.plans.symbolic import SymbolicGraph, Symbols, takes_all


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


# Graphs of small models, as Dynamo hands them over: a picture [2, 5, 4] and a text [2, 6, 4] of any length.
PICTURE, TEXT = torch.randn(2, 5, 4), torch.randn(2, 6, 4)


class Masked(nn.Module):
    """The picture attends to the first eight words, which are told by their places."""

    def forward(self, picture: Tensor, text: Tensor) -> Tensor:
        keys = (text + torch.arange(text.shape[1])[:, None]).exp()
        mask = (torch.arange(text.shape[1]) < 8).expand(picture.shape[1], -1)
        return scaled_dot_product_attention(picture, keys, keys, attn_mask=mask) + picture


class Given(nn.Module):
    """Which words count is given."""

    def forward(self, picture: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(picture, text, text, attn_mask=mask[:, None] > 0) + picture


class Plain(nn.Module):
    """Twice as many words as are given, in memory of their own and turned; none of them by its place."""

    def forward(self, picture: Tensor, text: Tensor) -> Tensor:
        keys = torch.cat([text, text.sin()], 1).transpose(0, 1).contiguous().transpose(0, 1)[:, 1:]
        return (picture @ keys.transpose(1, 2) / text.shape[1]).softmax(-1) @ keys + picture


class Pairs(nn.Module):
    """A value for each pair of words."""

    def forward(self, picture: Tensor, text: Tensor) -> Tensor:
        return (text @ text.transpose(1, 2)).flatten(1).sum(1)[:, None, None] + picture


@cache
def dynamic(kind: type[nn.Module], *more: Tensor) -> tuple[fx.GraphModule, list, Lengths]:
    graph, values = dynamic_graph(kind(), PICTURE, TEXT, *more, dims={1: (1,)})
    lengths = Lengths.of(graph, describe_inputs(graph.graph), values, [])
    assert lengths is not None
    return graph, values, lengths


@cache
def captured(kind: type[nn.Module], *more: Tensor) -> SymbolicGraph:
    graph, values, lengths = dynamic(kind, *more)
    return SymbolicGraph(graph, lengths, values)


@pytest.mark.parametrize("kind", [Masked, Plain])
def test_a_graph_for_some_length_computes_what_the_model_does(kind):
    """And each of its values has the sizes, strides and beginning that it is said to have."""
    for length in (4, 6, 8, 11):
        found, text = captured(kind).at((length,)), torch.randn(2, length, 4)
        placeholders = found.graph.find_nodes(op="placeholder")
        given = [text if node.meta["val"].shape == text.shape else PICTURE for node in placeholders]
        runner = fx.Interpreter(found, garbage_collect_values=False)
        constants = found.meta["constants"]
        (outputs,) = runner.run(*given[: len(given) - len(constants)], *constants)
        if kind is Plain or length <= 8:
            torch.testing.assert_close(outputs, kind()(PICTURE, text))
        for node, value in runner.env.items():
            if isinstance(value, Tensor):
                known = node.meta["val"]
                assert (known.shape, known.stride()) == (value.shape, value.stride())
                assert known.storage_offset() == value.storage_offset()


def test_what_depends_on_the_lengths_is_told():
    (symbol,) = captured(Plain).symbols.symbols
    sizes = captured(Plain).sizes
    assert set(sizes) == {symbol, 2 * symbol, 2 * symbol - 1}, "the divisor is one of them"
    assert sorted(captured(Plain).sizes_at((7,))) == [7, 13, 14]
    assert captured(Masked).orders and not captured(Plain).orders, "places of words"


def test_a_size_that_is_no_affine_function_is_refused():
    graph, values, lengths = dynamic(Pairs)
    with pytest.raises(UnsupportedGraph, match=r"is (text|pairs|.*)\.shape\[1\].*, no constant plus"):
        SymbolicGraph(graph, lengths, values)
    lengths.sides = (1,)
    assert SymbolicGraph(graph, lengths, values).sizes, "areas of pictures are none, either"
    lengths.sides = (0,)


def test_a_mask_of_lengths_is_left_out_where_it_hides_nothing_and_only_there():
    assert [captured(Masked).holds((length,)) for length in (2, 6, 8, 9, 20)] == [True, True, True, False, False]
    assert captured(Masked).at((7,)).graph.find_nodes(op="call_function", target=torch.ops.aten.lt.Scalar) == []
    mask = torch.ones(2, 6)
    graph, values = dynamic_graph(Given(), PICTURE, TEXT, mask, dims={1: (1,), 2: (1,)})
    lengths = Lengths.of(graph, describe_inputs(graph.graph), values, [])
    found = SymbolicGraph(graph, lengths, values)
    assert found.holds(lengths.at(values)) and found.holds((9,) * len(lengths.symbols))
    (attention,) = found.at((9,) * len(lengths.symbols)).graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert len(attention.all_input_nodes) > 2, "what hides words in one call may hide none in another"


def test_a_capture_that_fixes_the_length_is_refused(monkeypatch):
    graph, values, lengths = dynamic(Plain)
    monkeypatch.setattr(Symbols, "holds", lambda symbols, point: False)
    with pytest.raises(UnsupportedGraph, match="capturing it has fixed the length"):
        SymbolicGraph(graph, lengths, values)


class Halved(nn.Module):
    def forward(self, picture: Tensor) -> Tensor:
        return interpolate(picture[..., 1:, :], size=picture.shape[2:], mode="nearest") + picture


def test_slices_that_leave_something_out_at_some_sizes_are_told():
    graph, values = dynamic_graph(Halved(), torch.randn(1, 4, 6, 8), dims={0: (2, 3)})
    lengths = Lengths.of(graph, describe_inputs(graph.graph), values, [], Region.SIDES)
    assert lengths is not None and lengths.sides == (1, 1) and lengths.at(values) == (6, 8)
    found = SymbolicGraph(graph, lengths, values)
    assert any(found.cuts((6, 8))) and found.cuts((6, 8)) == found.cuts((10, 4))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, height: int) -> Tensor:
        rows = self.norm(x).reshape(x.shape[0], height, x.shape[1] // height, 4)
        return x + self.down((rows + rows.mean(2, keepdim=True)).flatten(1, 2).mul(2).sin() @ self.up.weight.T)


class Layers(nn.Module):
    """Repeated blocks, each of which is told the height of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(4)])

    def forward(self, picture: Tensor) -> Tensor:
        height = picture.shape[2] // 2
        x = picture.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, height)
        return x.transpose(1, 2).unflatten(2, picture.shape[2:])


def test_blocks_that_repeat_are_captured_once_for_all_lengths(monkeypatch):
    """The graph is the one that a capture of the whole gives, though blocks take numbers from outside."""
    graph, values = dynamic_graph(Layers(), torch.randn(1, 4, 6, 8), dims={0: (2, 3)})
    lengths = Lengths.of(graph, describe_inputs(graph.graph), values, [], Region.SIDES)
    assert lengths is not None
    traced: list[int] = []

    def tracing(module: Any, *given: Any, trace: Callable = export.traced) -> fx.GraphModule:
        traced.append(len(module.graph_module.graph.nodes))
        return trace(module, *given)

    monkeypatch.setattr(export, "traced", tracing)
    found = SymbolicGraph(graph, lengths, values)
    assert len(traced) == 2 and sum(traced) < len(graph.graph.nodes)
    monkeypatch.setattr(export, "by_blocks", Mock(side_effect=NotRepeated))
    whole = SymbolicGraph(graph, lengths, values)
    for point in ((6, 8), (10, 4)):
        assert found.holds(point)
        given = [torch.randn(1, 4, *point) if v.shape == (1, 4, 6, 8) else v for v in values if isinstance(v, Tensor)]
        one, other = found.at(point), whole.at(point)
        assert [node.target for node in one.graph.nodes][len(given) :] == [node.target for node in other.graph.nodes][
            len(given) :
        ]
        assert torch.equal(one(*given)[0], other(*given)[0])
    assert found.holds((7, 8)) == whole.holds((7, 8))


def test_another_graph_may_be_captured_meanwhile(monkeypatch):
    """As another thread does: each capture has numbers of its own."""
    graph, values = dynamic_graph(Layers(), torch.randn(1, 4, 6, 8), dims={0: (2, 3)})
    lengths = Lengths.of(graph, describe_inputs(graph.graph), values, [], Region.SIDES)
    assert lengths is not None
    others: list[SymbolicGraph] = []

    def tracing(*given: Any, trace: Callable = export.traced) -> fx.GraphModule:
        if not others:
            monkeypatch.setattr(export, "traced", trace)
            others.append(SymbolicGraph(graph, lengths, values))
        return trace(*given)

    monkeypatch.setattr(export, "traced", tracing)
    found = SymbolicGraph(graph, lengths, values)
    assert not notices.fallbacks() and found.holds((10, 4)) and others[0].holds((10, 4))


class Text(nn.Module):
    """Has a text, the number of its words, another number, and a picture that is returned."""

    def forward(self, picture: Tensor, text: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return picture + text.sum() + other.sum() / text.shape[1], picture.exp()


def told(dims: dict[int, tuple[int, ...]], *given: Any, region: Region = Region.NOTHING, model=Text, numbers=()) -> Any:
    graph, values = dynamic_graph(model(), *given, dims=dims)
    lengths = Lengths.of(graph, describe_inputs(graph.graph), values, numbers, region)
    return None if lengths is None else (lengths.at(values), lengths.sides)


def test_sizes_of_what_is_given_and_not_returned_are_lengths():
    shapes = torch.randn(2, 5, 4), torch.randn(2, 6, 3), torch.randn(7, 9)
    assert told({}, *shapes) is None, "no size is a symbol"
    assert told({1: (1,)}, *shapes) == ((6,), (0,))
    assert sorted(told({1: (1,), 2: (0,)}, *shapes)[0]) == [6, 7]
    assert sorted(told({1: (1,), 2: (0, 1)}, *shapes)[0]) == [6, 7, 9]
    assert sorted(told({1: (1, 2), 2: (0, 1)}, *shapes)[0]) == [3, 6, 7, 9]
    assert told({0: (1,)}, *shapes) is None, "it is returned"
    assert told({0: (1,), 1: (1,)}, *shapes) == ((6,), (0,)), "the text's alone"


def test_tokens_of_a_packed_latent_are_a_length_where_they_are_asked_for():
    shapes = torch.randn(2, 5, 4), torch.randn(2, 6, 3), torch.randn(7, 9)
    assert sorted(told({0: (1,), 1: (1,)}, *shapes, region=Region.TOKENS)[0]) == [5, 6]
    assert told({0: (1,)}, *shapes, region=Region.TOKENS) == ((5,), (0,))
    assert told({1: (1,)}, *shapes, region=Region.TOKENS) is None, "the latent's own tokens are no symbol"
    assert told({0: (0,)}, *shapes, region=Region.TOKENS) is None, "samples are no tokens"
    assert told({0: (1,)}, torch.randn(5, 4), *shapes[1:], region=Region.TOKENS) is None, "it is not packed"
    assert told({0: (2,)}, torch.randn(2, 4, 5, 5), *shapes[1:], region=Region.TOKENS) is None


def test_sides_of_a_latent_are_lengths_where_they_are_asked_for():
    picture, *others = torch.randn(2, 4, 5, 8), torch.randn(2, 6, 3), torch.randn(7, 9)
    assert told({0: (2, 3)}, picture, *others, region=Region.SIDES) == ((5, 8), (1, 1))
    assert told({0: (3,)}, picture, *others, region=Region.SIDES) == ((8,), (1,))
    point, sides = told({0: (2, 3), 1: (1,)}, picture, *others, region=Region.SIDES)
    assert sorted(zip(point, sides, strict=True)) == [(5, 1), (6, 0), (8, 1)]
    assert told({1: (1,)}, picture, *others, region=Region.SIDES) is None, "its own sides are no symbols"
    assert told({0: (1,)}, picture, *others, region=Region.SIDES) is None, "channels are no side"
    assert told({0: (1,)}, torch.randn(2, 5, 4), *others, region=Region.SIDES) is None, "it is packed"
    video = torch.randn(2, 4, 3, 5, 8)
    assert sorted(told({0: (2, 3, 4)}, video, *others, region=Region.SIDES)[0]) == [3, 5, 8]
    more = told({0: (2, 3, 4), 1: (1,), 2: (0,)}, video, *others, region=Region.SIDES)
    assert sorted(zip(*more, strict=True))[:3] == [(3, 1), (5, 1), (6, 0)], (
        "more than four: the sides, and one of the others"
    )
