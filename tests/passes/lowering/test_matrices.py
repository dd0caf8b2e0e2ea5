"""Linears on matrices give what linears on tensors do."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ras_compile.passes.lowering.matrices import flatten_linears

aten = torch.ops.aten


def test_linears_are_flattened():
    first, second, third = nn.Linear(6, 8), nn.Linear(8, 4, bias=False), nn.Linear(4, 2)

    def model(x, w, b, v, u, c):
        y = torch.nn.functional.linear(x.transpose(1, 2), w, b)
        return torch.nn.functional.linear(torch.nn.functional.linear(y, v)[0, 0], u, c)

    given = (torch.randn(2, 3, 5, 6), first.weight, first.bias, second.weight, third.weight, third.bias)
    with torch.no_grad(), FakeTensorMode() as mode:
        traced = make_fx(model, pre_dispatch=True)(*(mode.from_tensor(value) for value in given))
    linears = traced.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [node.args[0].meta["val"].ndim for node in linears] == [4, 4, 2]
    assert flatten_linears(traced.graph) == 2
    traced.recompile()
    linears = traced.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [node.meta["val"].shape for node in linears] == [(30, 8), (30, 4), (3, 2)]
    assert [node.args[0].meta["val"].ndim for node in linears] == [2, 2, 2]
    with torch.no_grad():
        assert torch.allclose(traced(*given), model(*given), atol=1e-6)
    assert flatten_linears(traced.graph) == 0
