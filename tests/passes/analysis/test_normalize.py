"""Ops without a rule are spelled out where PyTorch makes them of others."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ras_compile.capture.export import capture, export
from ras_compile.passes.analysis.normalize import join_writes
from ras_compile.passes.rules import constants
from ras_compile.passes.rules.pointwise import find_rule
from ras_compile.preview import record_call

aten = torch.ops.aten
WEIGHT = (torch.arange(48.0) - 20).reshape(16, 3) / 10


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, w: Tensor) -> tuple:
        result = self.function(x, w)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


SPELLED = {
    aten.tensordot.default: lambda x, w: torch.tensordot(x, w, 1),
    aten.inner.default: lambda x, w: torch.inner(x, w.mT),
    aten.linalg_vecdot.default: lambda x, w: torch.linalg.vecdot(x, x * 2),
    aten.pairwise_distance.default: lambda x, w: F.pairwise_distance(x, x + 1),
    aten.hstack.default: lambda x, w: torch.hstack([x, x]),
    aten.column_stack.default: lambda x, w: torch.column_stack([x, x]),
    aten.take_along_dim.default: lambda x, w: torch.take_along_dim(x, x.argsort(-1), -1),
    aten.broadcast_tensors.default: lambda x, w: torch.broadcast_tensors(x, x[:, :1]),
    aten.trapezoid.dx: lambda x, w: torch.trapezoid(x, dim=-1),
    aten.msort.default: lambda x, w: torch.msort(x),
    aten.narrow.default: lambda x, w: torch.narrow(x, 1, -3, 2),
    aten.movedim.int: lambda x, w: torch.movedim(x, -1, 1),
    aten.movedim.intlist: lambda x, w: torch.movedim(x, [2, 0], [0, 1]),
    aten.moveaxis.int: lambda x, w: torch.moveaxis(x, 0, -1),
    aten.numpy_T.default: lambda x, w: x[0].T,
    aten.swapaxes.default: lambda x, w: torch.swapaxes(x, 0, 1),
    aten.swapdims.default: lambda x, w: torch.swapdims(x, 1, -1),
    aten.mT.default: lambda x, w: x.mT,
    aten.cosine_similarity.default: lambda x, w: F.cosine_similarity(x[:, :, None], x[:, None], -1),
}


@pytest.mark.parametrize("target", SPELLED, ids=str)
def test_what_has_no_rule_is_spelled_out(target):
    """The same values, by ops that have rules, each with the user's line."""
    with pytest.raises(Exception, match="no rule"):
        find_rule(torch.fx.Graph().call_function(target, ()))
    given = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), WEIGHT
    module = Calls(SPELLED[target])
    captured = export(module, given)
    calls = [node for node in captured.graph.nodes if node.op == "call_function"]
    assert target not in {node.target for node in calls}
    for node in calls:
        if node.all_input_nodes and node.target is not operator.getitem:
            find_rule(node)
    for found, wanted in zip(captured(*given), module(*given), strict=True):
        torch.testing.assert_close(found, wanted)


class EncoderLayer(nn.Module):
    def __init__(self, mask, **config) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, **config)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        hidden = {name: torch.ones(shape, dtype=torch.bool).tril(-1) for name, shape in self.mask.items()}
        return self.layer(x, **hidden)


@pytest.mark.parametrize("norm_first, activation", [(True, "gelu"), (False, "relu")])
@pytest.mark.parametrize("mask", [{}, {"src_mask": (5, 5)}, {"src_key_padding_mask": (2, 5)}], ids=str)
def test_an_encoder_layer_is_spelled_out(norm_first, activation, mask):
    """PyTorch calls one op for all of it; its linears and its attention stay whole."""
    module, x = EncoderLayer(mask, activation=activation, norm_first=norm_first).eval(), torch.randn(2, 5, 16)
    graph, _, values = record_call(module, {"x": x})
    assert graph.graph.find_nodes(op="call_function", target=torch._transformer_encoder_layer_fwd)
    captured = capture(graph, values)
    with torch.no_grad():
        torch.testing.assert_close(captured(*values)[0], module(x))
    targets = [node.target for node in captured.graph.nodes if node.op == "call_function"]
    assert targets.count(aten.linear.default) == 4 and targets.count(aten.scaled_dot_product_attention.default) == 1


def test_what_has_a_rule_stays_as_it_is():
    captured = export(Calls(lambda x, w: F.layer_norm(x, (16,)) @ w), (torch.randn(2, 5, 16), WEIGHT))
    assert [n.target for n in captured.graph.nodes if n.op == "call_function"] == [
        aten.layer_norm.default,
        aten.matmul.default,
    ]


def attention(mask):
    def function(x, w):
        tokens = x[:, None]  # [2, 1, 5, 16]
        return F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask(x, w))

    return function


def one_hidden(x, w):
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2, 3] = False
    return mask


MASKS = {
    "ones": (True, lambda x, w: torch.ones(2, 5, dtype=torch.int32).bool().view(2, 1, 1, 5).expand(-1, -1, 5, -1)),
    "zeros that are added": (True, lambda x, w: torch.zeros(5, 5)),
    "one entry hidden": (False, one_hidden),
    "ones that are added": (False, lambda x, w: torch.ones(5, 5).tril()),
    "an argument's values": (False, lambda x, w: (w[:5, :1] > -100).expand(5, 5)),
    "random": (False, lambda x, w: torch.rand(5, 5) >= 0),
}


@pytest.mark.parametrize("open_, mask", MASKS.values(), ids=MASKS)
def test_a_mask_goes_if_it_is_sure_to_hide_nothing(open_, mask):
    given = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), WEIGHT
    module = Calls(attention(mask))
    captured = export(module, given)
    (node,) = captured.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    given_mask = {**dict(zip(("query", "key", "value", "attn_mask"), node.args, strict=False)), **node.kwargs}
    assert (given_mask.get("attn_mask") is None) == open_
    for found, wanted in zip(captured(*given), module(*given), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_mask_that_is_too_large_is_not_computed(monkeypatch):
    monkeypatch.setattr(constants, "LARGEST_CONSTANT", 24)
    captured = export(
        Calls(attention(lambda x, w: torch.ones(5, 5, dtype=torch.bool))), (torch.randn(2, 5, 16), WEIGHT)
    )
    (node,) = captured.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert any(operand.meta["val"].dtype is torch.bool for operand in node.all_input_nodes)


def test_a_mask_on_the_meta_device_is_kept():
    """A model without memory can be captured and explained; nobody can look at what its masks hold."""
    module = Calls(attention(lambda x, w: torch.ones(5, 5, dtype=torch.bool, device=x.device)))
    captured = export(module, (torch.randn(2, 5, 16, device="meta"), WEIGHT.to("meta")))
    (node,) = captured.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert any(operand.meta["val"].dtype is torch.bool for operand in node.all_input_nodes)


def test_a_segment_of_nothing_is_no_segment():
    given = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), WEIGHT
    module = Calls(lambda x, w: torch.cat([x[:, :5], x[:, 5:].exp()], 1))
    captured = export(module, given)
    assert not [node for node in captured.graph.nodes if node.target is aten.exp.default]
    torch.testing.assert_close(captured(*given)[0], module(*given)[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.as_strided((2, 5, 8), (80, 16, 2)),
        lambda x: x.as_strided((2, 5, 8), (80, 16, 2), 1),
        lambda x: x.as_strided((16, 5, 2), (1, 16, 80)),
        lambda x: x.as_strided((2, 3, 5, 4), (80, 0, 16, 4)),
        lambda x: x.transpose(1, 2).as_strided((2, 1, 5, 4), (80, 7, 16, 4)),
        lambda x: x.as_strided((2, 160), (0, 1)),
    ],
)
def test_plain_strides_are_views(function):
    given = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), WEIGHT
    module = Calls(lambda x, w: function(x + 1))
    captured = export(module, given)
    assert not [node for node in captured.graph.nodes if node.target is aten.as_strided.default]
    torch.testing.assert_close(captured(*given)[0], module(*given)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "strides", [((2, 4, 8), (16, 8, 1)), ((2, 3, 16), (80, 32, 1)), ((2, 9), (80, 9)), ((3,), (7,))]
)
def test_strides_that_overlap_or_divide_nothing_stay(strides):
    given = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), WEIGHT
    module = Calls(lambda x, w: (x + 1).as_strided(*strides))
    captured = export(module, given)
    torch.testing.assert_close(captured(*given)[0], module(*given)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "reduced", [torch.amax, torch.amin, torch.max, torch.min], ids=lambda function: function.__name__
)
def test_an_extreme_of_all_tokens_is_one_of_each_tokens_own(reduced):
    """A sparse step then keeps one number of a token, not its channels (scales of a whole activation, in float8)."""

    def scaled(x, w):
        return x / reduced(x.abs())

    given = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)), WEIGHT
    captured = export(Calls(scaled), given)
    named = [node for node in captured.graph.nodes if reduced.__name__[-3:] in node.name]
    assert [tuple(node.meta["val"].shape) for node in named] == [(2, 5, 1), ()]
    assert torch.equal(captured(*given)[0], scaled(*given))


def rotated(x, parts, out=None):
    """Rotary positions whose results are written into every second place of a new tensor."""
    out = torch.empty_like(x) if out is None else out
    for start in parts:
        out[..., start::2] = x[..., start::2] * 2 + start
    return out


@pytest.mark.parametrize(
    ("function", "joined"),
    [
        (lambda x, w: rotated(x, (0, 1)), True),
        (lambda x, w: rotated(x, (1, 0)), True),
        (lambda x, w: rotated(x, (0, 1), torch.empty_like(x, dtype=torch.float64)), True),
        (lambda x, w: rotated(x, (0,), x.clone()), False),  # every second place stays
        (lambda x, w: rotated(x.mT.contiguous(), (0, 1), torch.zeros_like(x).mT), False),  # not contiguous
    ],
)
def test_interleaved_writes_are_a_stack(function, joined):
    given = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)), WEIGHT
    module = Calls(function)
    captured = export(module, given)
    targets = [node.target for node in captured.graph.nodes]
    assert (aten.stack.default in targets) == joined
    assert (aten.slice_scatter.default in targets) != joined
    for found, wanted in zip(captured(*given), module(*given), strict=True):
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype


def test_interleaved_writes_of_a_length_that_is_a_symbol_stay():
    """Their bounds may be nodes of the graph, which have no order."""

    def run(x):
        return rotated(x, (0, 1))

    graph = make_fx(torch.func.functionalize(run), tracing_mode="symbolic")(torch.randn(2, 6, 16)).graph
    written = [node for node in graph.nodes if node.target is aten.slice_scatter.default]
    for node in written:
        join_writes(graph, node)
    assert written and all(node in graph.nodes for node in written)
